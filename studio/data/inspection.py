"""What a data file holds, before anything is trained on it: `studio data inspect`, and the same for the browser.

One pass over the file, in bounded memory: 24 bytes a row, and for near-duplicates 256 of each of the first NEAR_ROWS.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from studio.data import inspection_notes
from studio.data.duplicates import Duplicates, NearDuplicates, Places
from studio.data.files import Progress, kind_of
from studio.data.formats import FORMATS, KINDS, OtherKindError, fits, known_columns, mapped, unread_columns
from studio.data.json_text import RowProblems
from studio.data.lengths import TokenCounter
from studio.data.of_recipe import written_by_template
from studio.data.reading import Reading, converted
from studio.data.rendered import Rendered, ReportPart, rendered_rows
from studio.data.rows import Labelled, Message, Place, PlainText, Preference, Row, RowKind
from studio.data.scripts import Scripts
from studio.errors import DataError, Problem, ProblemGroups
from studio.methods import METHODS, reading_kind
from studio.models import resolve_base

if TYPE_CHECKING:
    from studio.recipe import Recipe

DETECTED_ROWS = 1000
"""Rows that the detection of the format looks at."""

MOST_SOURCES, OTHER_SOURCES = 10_000, "(other sources)"
"""Sources that are told apart: some data sets name one in every row."""

SHOWN = 20
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
EXAMPLES = 3
BATCH_ROWS = 256
MAX_LENGTH_TOKENS = 256
"""Where there is no recipe: as a recipe's default."""


class FormatShare(ReportPart):
    """A format and how many rows were read as it."""

    name: str
    title: str
    rows: int


class Pair(ReportPart):
    """Where a row stands, and the earlier one that it equals or is like: lines, or rows as `counted` says."""

    file: str
    line: int
    earlier_file: str
    earlier_line: int
    counted: str


class DataReport(ReportPart):
    """What `inspect_data` found.

    Attributes:
        kind: of file.
        rows, good_rows, bad_rows: of the file; of the bad ones each has at least one problem.
        other_rows: good rows of kinds that the recipe's method does not read; other_method: which methods read them.
        problems: the first 20, and hidden_problems how many more there are. problem_groups: {"where", "field",
            "message", "count"} of the first 20 that differ, each once for all its rows; ungrouped_problems: of others.
        format: that most of the first rows fit; "" where none does.
        sure: share of these `detected_rows` rows that fit it and no other.
        unread: columns that hold something and are passed over: in how many of these rows; the 20 most frequent.
        formats: what the good rows were read as.
        kinds: rows by what they are for training: example, text, preference, labelled.
        traits: rows that have system prompts, several turns, tool calls, tools, reasoning.
        roles: turns by role. sources: rows by data source, the largest 20.
        tokens: of a row, by the base's tokenizer, with 8 a turn for the chat template: quantile → tokens; "total".
        truncated_rows: rows longer than max_length_tokens. long_prompts: those of which the prompt alone fills it,
            which training refuses; the first 20 as long_prompt_problems.
        duplicate_rows: rows that equal an earlier one; near_duplicate_rows: among the first `near_rows`, those that
            are like an earlier one. Each with the places of the first 20.
        scripts: share of the letters by script, of the first 2,000 characters of each row.
        loss_on: what of the examples is shown as trained.
        examples: three rows as the model reads them.
        notes: what to know besides.
    """

    file: str
    kind: str
    base: str
    rows: int
    good_rows: int
    bad_rows: int
    other_rows: int
    other_method: str
    problems: tuple[dict[str, Any], ...]
    hidden_problems: int
    problem_groups: tuple[dict[str, Any], ...]
    ungrouped_problems: int
    format: str
    sure: float
    detected_rows: int
    unread: dict[str, int]
    formats: tuple[FormatShare, ...]
    kinds: dict[str, int]
    traits: dict[str, int]
    roles: dict[str, int]
    sources: dict[str, int]
    tokens: dict[str, int]
    max_length_tokens: int
    truncated_rows: int
    long_prompts: int
    long_prompt_problems: tuple[dict[str, Any], ...]
    duplicate_rows: int
    duplicates: tuple[Pair, ...]
    near_duplicate_rows: int
    near_duplicates: tuple[Pair, ...]
    near_rows: int
    scripts: dict[str, float]
    loss_on: str
    examples: tuple[Rendered, ...]
    notes: tuple[str, ...]


def inspect_data(
    file: Path | str,
    *,
    recipe: Recipe | None = None,
    base: str = "embedded",
    columns: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> DataReport:
    """Reads `file` to its end and says what it holds.

    Args:
        file: anything that `data.train` takes.
        recipe: whose base, format, columns, training method and lengths are used; None: rows of every kind are good.
        base: where there is no recipe, whose tokenizer and chat template are used.
        columns: {ours: theirs}, as `data.columns`, over those of the recipe.
        progress: called with (bytes read, bytes in all); rows where a file has no bytes to count.

    Raises:
        DataError: the file cannot be read, or holds not one row.
        RecipeError: `columns` map to none of ours.
        StudioError: the base is not here.
    """
    directory = resolve_base(recipe.model.base if recipe else base)
    reading = Reading.of(recipe) if recipe else Reading(written=written_by_template(base))
    reading = replace(reading, columns={**reading.columns, **known_columns(columns or {})})
    limit = recipe.data.max_length_tokens if recipe else MAX_LENGTH_TOKENS
    kinds = METHODS[recipe.training.method].rows if recipe else tuple(KINDS)
    seen = _Seen(TokenCounter(directory), limit)
    cut = False
    named: list[str] = []
    detected: Counter[str] = Counter()
    alone: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    other: Counter[RowKind] = Counter()
    for raw, outcome in converted(file, kinds, reading, progress):
        if raw is None:
            assert isinstance(outcome, Problem)
            seen.add_problems([outcome])
            cut = True
            continue
        if seen.rows < DETECTED_ROWS and not isinstance(raw.values, RowProblems):
            named = named or list(raw.values)
            names = _fitting(raw.values, reading)
            detected.update(names)
            alone.update(names if len(names) == 1 else [])
        if isinstance(outcome, OtherKindError):
            other[outcome.row.kind] += 1
            seen.add(outcome.form, outcome.row)
        elif isinstance(outcome, RowProblems):
            seen.add_bad(raw.file, raw.line, raw.counted, outcome)
        elif isinstance(outcome, tuple):
            if seen.rows < DETECTED_ROWS:
                unread.update(unread_columns(cast(dict[str, Any], raw.values), outcome[0], reading.columns))
            seen.add(*outcome)
    seen.flush()
    if not seen.rows:
        raise DataError(seen.problems or [Problem("", None, "the file is empty; it needs at least one row", str(file))])
    looked_at = min(seen.rows, DETECTED_ROWS)
    form = max(detected, key=lambda name: (alone[name], detected[name]), default="")
    loss_on = recipe.training.loss_on if recipe else "completion"
    examples, notes = rendered_rows(directory, seen.chosen_examples(), limit, loss_on)
    return DataReport(
        file=str(file),
        kind=kind_of(Path(file)),
        base=recipe.model.base if recipe else base,
        rows=seen.rows,
        other_rows=other.total(),
        other_method=_other_method(recipe, other, seen.rows) if recipe else "",
        good_rows=seen.rows - seen.bad_rows,
        bad_rows=seen.bad_rows,
        problems=tuple(vars(problem) for problem in seen.problems[:SHOWN]),
        hidden_problems=max(0, seen.problem_count - SHOWN),
        problem_groups=tuple(
            {"where": each.where, "field": each.first.field, "message": each.first.message, "count": each.count}
            for each in seen.groups.all[:SHOWN]
        ),
        ungrouped_problems=seen.problem_count - sum(each.count for each in seen.groups.all[:SHOWN]),
        format=form,
        sure=alone[form] / looked_at if form else 0.0,
        detected_rows=looked_at,
        unread=dict(unread.most_common(SHOWN)),
        loss_on=loss_on,
        examples=examples,
        notes=(
            *([inspection_notes.CUT] if cut else []),
            *inspection_notes.of_columns(form, named),
            *inspection_notes.of_formats(seen, reading, looked_at, detected),
            *inspection_notes.of_ratings(seen, unread),
            *notes,
        ),
        max_length_tokens=limit,
        **seen.facts(),
    )


def _fitting(values: dict[str, Any], reading: Reading) -> list[str]:
    """The formats that a row fits under the names that the recipe gives its columns."""
    try:
        return fits(mapped(values, reading.columns))
    except RowProblems:
        return []


class _Seen:
    """What has been counted so far."""

    def __init__(self, counter: TokenCounter, max_length_tokens: int):
        self.counter, self.max_length_tokens = counter, max_length_tokens
        self.rows = self.bad_rows = self.problem_count = self.long_prompts = 0
        self.problems: list[Problem] = []
        self.groups = ProblemGroups()
        self.long: list[Problem] = []
        self.lengths = array("I")
        self.formats: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.traits: Counter[str] = Counter()
        self.roles: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self.places, self.same, self.near, self.scripts = Places(), Duplicates(), NearDuplicates(), Scripts()
        self.pending: list[Row] = []
        self.pending_characters = 0
        self.examples: list[tuple[int, Row]] = []
        self.random = random.Random(0)

    def add_problems(self, problems: Sequence[Problem]) -> None:
        self.problem_count += len(problems)
        for problem in problems:
            self.groups.add(problem)
        self.problems += problems[: max(0, SHOWN - len(self.problems))]

    def add_bad(self, file: str, line: int, counted: str, outcome: RowProblems) -> None:
        self.rows += 1
        self.bad_rows += 1
        self.add_problems([Problem(name, line, said, file, counted) for name, said in outcome.problems])

    def add(self, form: str, row: Row) -> None:
        self.rows += 1
        good = self.rows - self.bad_rows
        self.formats[form] += 1
        self.kinds[row.kind] += 1
        known = row.source in self.sources or len(self.sources) < MOST_SOURCES
        self.sources[row.source if known else OTHER_SOURCES] += 1
        messages = turns_of(row)
        self.roles.update(message.role for message in messages)
        self.traits.update(traits_of(row, messages))
        text = "\n".join(f"{m.role}: {m.thinking}{m.content}{m.tool_calls or ''}" for m in messages)
        text = text if messages else getattr(row, "text", "")
        text += f"\n{row.label}" if isinstance(row, Labelled) else ""
        self.places.add(row.place or Place("", good))
        self.same.add(text)
        self.near.add(text)
        self.scripts.add(text)
        self._keep_example(row, good)
        self.pending.append(row)
        self.pending_characters += len(text)
        if len(self.pending) == BATCH_ROWS or self.pending_characters > 2**22:
            self.flush()

    def _keep_example(self, row: Row, good: int) -> None:
        """The first row, and of the others a sample in which each is as likely."""
        if len(self.examples) < EXAMPLES:
            self.examples.append((good, row))
        elif (place := self.random.randrange(good - 1)) < EXAMPLES - 1:
            self.examples[1 + place] = (good, row)

    def chosen_examples(self) -> list[Row]:
        """The rows to show, in file order."""
        return [row for _, row in sorted(self.examples, key=lambda numbered: numbered[0])]

    def flush(self) -> None:
        lengths = self.counter.lengths(self.pending)
        self.lengths.extend(lengths)
        long = self.counter.long_prompts(self.pending, lengths, self.max_length_tokens)
        self.long_prompts += len(long)
        self.long += [problem for _, problem in long][: SHOWN - len(self.long)]
        self.pending, self.pending_characters = [], 0

    def facts(self) -> dict[str, Any]:
        same = self.same.found()
        near = self.near.found(known=same[0])
        return {
            "formats": tuple(
                FormatShare(name=name, title=FORMATS[name].title, rows=count)
                for name, count in self.formats.most_common()
            ),
            "kinds": dict(self.kinds),
            "traits": dict(self.traits.most_common()),
            "roles": dict(self.roles.most_common()),
            "sources": dict(self.sources.most_common(SHOWN)),
            "tokens": _quantiles(self.lengths),
            "truncated_rows": sum(length > self.max_length_tokens for length in self.lengths),
            "long_prompts": self.long_prompts,
            "long_prompt_problems": tuple(map(vars, self.long)),
            "duplicate_rows": same.shape[1],
            "duplicates": self._pairs(same[:, :SHOWN].T.tolist()),
            "near_duplicate_rows": near.shape[1],
            "near_duplicates": self._pairs(near[:, :SHOWN].T.tolist()),
            "near_rows": self.near.rows,
            "scripts": self.scripts.shares(),
        }

    def _pairs(self, rows: Sequence[Sequence[int]]) -> tuple[Pair, ...]:
        places = [(self.places.at(later), self.places.at(earlier)) for later, earlier in rows]
        return tuple(
            Pair(file=p.file, line=p.line, earlier_file=q.file, earlier_line=q.line, counted=p.counted)
            for p, q in places
        )


def turns_of(row: Row) -> list[Message]:
    """All turns of a row, of a pair the prompt once; none of plain text."""
    if isinstance(row, PlainText):
        return []
    if isinstance(row, Preference):
        return [*row.prompt, *row.chosen, *row.rejected]
    return [*row.prompt, *row.completion]


def traits_of(row: Row, messages: Sequence[Message]) -> list[str]:
    """What is special about a row, in words."""
    found = {
        "system prompt": any(message.role == "system" for message in messages),
        "several turns": sum(message.role == "user" for message in messages) > 1,
        "tool calls": any(message.tool_calls for message in messages),
        "tools": bool(getattr(row, "tools", ())),
        "reasoning": any(message.thinking or message.content.startswith("<think>") for message in messages),
    }
    return [name for name, there in found.items() if there]


def _quantiles(lengths: array[int]) -> dict[str, int]:
    if not lengths:
        return {}
    import numpy as np

    counts = np.frombuffer(lengths, dtype=np.uint32)
    found = np.quantile(counts, QUANTILES, method="nearest").tolist()
    return {**{f"{100 * q:g} %": int(n) for q, n in zip(QUANTILES, found, strict=True)}, "total": int(counts.sum())}


def _other_method(recipe: Recipe, other: Counter[RowKind], rows: int) -> str:
    """That rows are of kinds that the recipe's method does not read, and which methods do."""
    method, told = recipe.training.method, []
    for kind, count in other.items():
        readers = ", ".join(reading_kind(kind))
        of = f"{count:,} of {rows:,} rows"
        told.append(f"{of}: each is {KINDS[kind]}, which {method} does not read; {readers} do")
    return ". ".join(told)
