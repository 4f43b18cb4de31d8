"""Held-out rows that occur in the training data: a result on them says nothing.

A row leaks where a training row asks the same (white space and case aside), or says nearly the same: a Jaccard
similarity of its word triples of `NEAR` or more. Candidates come from MinHash with locality-sensitive hashing
(datasketch; Broder 1997, "On the resemblance and containment of documents") at a lower threshold, and each one is then
compared exactly: none is reported that is less similar, and few that are more similar are missed.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from studio.data.rows import Example, Place, PlainText, Row, sequences, wanted_sequences
from studio.data.split import folded, prompt_of
from studio.errors import SHOWN_PROBLEMS, DataError, Problem
from studio.job_files import read_json, to_json, write_atomic

VERSION = 1
NEAR = 0.8
CANDIDATES = 0.7
"""Similarity of the LSH's threshold, below `NEAR` so that rows just above that are seldom missed."""

PERMUTATIONS = 64
SCHEME: Literal["affine32"] = "affine32"

MOST_NEAR_ROWS = 20_000
"""Training rows among which a plan looks for near-duplicates; it takes about 0.1 ms each."""

WORDS, LETTERS = 3, 8
"""Length of a shingle, in words; in letters for texts without spaces between words."""

LONG_WORD = 20


@dataclass(frozen=True)
class Leak:
    """A held-out row and the first training row that it was found in; `similarity` 1 and `near` False: one prompt."""

    held_out: Row
    train: Row
    near: bool
    similarity: float


class LeakPlan(BaseModel):
    """What was found.

    Attributes:
        held_out: rows looked at. same_prompt, near: those of them that leak.
        compared: training rows that were looked through for near-duplicates; all were for equal prompts.
        shown: the first of them in words, with files and lines.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    held_out: int
    same_prompt: int
    near: int
    compared: int
    train: int
    shown: tuple[str, ...]

    @property
    def found(self) -> int:
        return self.same_prompt + self.near


def find_leaks(
    train: Sequence[Row], held_out: Sequence[Row], most_near_rows: int | None = MOST_NEAR_ROWS
) -> list[Leak]:
    """The held-out rows that leak, in their order, each once.

    Args:
        most_near_rows: look for near-duplicates among so many of the training rows; None: all.
    """
    same = _same_prompts(train, held_out)
    left = [number for number in range(len(held_out)) if number not in same]
    near = _near(train[:most_near_rows], [held_out[number] for number in left])
    return [leak for _, leak in sorted([*same.items(), *((left[number], leak) for number, leak in near.items())])]


def leak_plan(train: Sequence[Row], held_out: Sequence[Row], most_near_rows: int | None = MOST_NEAR_ROWS) -> LeakPlan:
    """What `find_leaks` finds, counted and in words; kept in the user's cache for the next plan of the same rows."""
    kept = _kept_at(train, held_out, most_near_rows)
    try:
        return LeakPlan.model_validate(read_json(kept))
    except (OSError, ValueError):  # none, torn, or of another version
        found = _leak_plan(train, held_out, most_near_rows)
    with suppress(OSError):  # a cache that cannot be written costs time alone
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, to_json(found.model_dump(mode="json")))
    return found


def _kept_at(train: Sequence[Row], held_out: Sequence[Row], most_near_rows: int | None) -> Path:
    """By the contents of the files, the rows of them that are on each side, and how the first of these were read."""
    from adapters.fingerprint import sha256
    from adapters.packed_cache import default_cache_dir
    from studio.profile import quick_digest

    parts = [json.dumps([VERSION, NEAR, PERMUTATIONS, most_near_rows]).encode()]
    for side in (train, held_out):
        files: dict[str, array[int]] = {}
        for row in side:
            file, line, _ = row.place or Place("", 0)
            if file not in files:
                parts.append(json.dumps(row.as_row()).encode())
            files.setdefault(file, array("q")).append(line)
        for file, lines in files.items():
            parts += [Path(file).name.encode(), quick_digest(Path(file)).encode(), lines.tobytes()]
        parts.append(b"|")
    return default_cache_dir().with_name("leaks") / f"{sha256(*parts)[:32]}.json"


def _leak_plan(train: Sequence[Row], held_out: Sequence[Row], most_near_rows: int | None) -> LeakPlan:
    leaks = find_leaks(train, held_out, most_near_rows)
    return LeakPlan(
        held_out=len(held_out),
        same_prompt=sum(not leak.near for leak in leaks),
        near=sum(leak.near for leak in leaks),
        compared=len(train[:most_near_rows]),
        train=len(train),
        shown=tuple(map(_said, leaks[:SHOWN_PROBLEMS])),
    )


def refuse_leaks(found: LeakPlan) -> None:
    """Raises:
    DataError: any held-out row leaks.
    """
    if found.found:
        advice = "take them out of one of the files, or set data.leakage to warn"
        problems = [Problem("", None, said, "held-out rows in the training data") for said in found.shown]
        last = Problem("", None, f"{leaks_text(found)}; {advice}", "held-out rows in the training data")
        raise DataError([*problems, last], found.found - len(problems))


def leaks_text(found: LeakPlan) -> str:
    """The counts in words, and what was not looked at."""
    words = f"{found.found:,} of {found.held_out:,} held-out rows occur in the training data"
    if found.found:
        words += f" ({found.same_prompt:,} with the same prompt, {found.near:,} nearly the same)"
    if found.compared < found.train:
        words += f"; near-duplicates were looked for in the first {found.compared:,} of {found.train:,} training rows"
    return words


def _said(leak: Leak) -> str:
    how = f"nearly the same ({leak.similarity:.2f})" if leak.near else "the same prompt"
    return f"{_where(leak.held_out)}: {how} as {_where(leak.train)}"


def _where(row: Row) -> str:
    place = row.place or Place("a row", 0)
    return f"{Path(place.file).name} {place.counted} {place.line}"


def _same_prompts(train: Sequence[Row], held_out: Sequence[Row]) -> dict[int, Leak]:
    wanted: dict[str, list[int]] = {}
    for number, row in enumerate(held_out):
        wanted.setdefault(prompt_of(row), []).append(number)
    found: dict[int, Leak] = {}
    for row in train:
        for number in wanted.pop(prompt_of(row), ()):
            found[number] = Leak(held_out[number], row, near=False, similarity=1.0)
    return found


def _near(train: Sequence[Row], held_out: Sequence[Row]) -> dict[int, Leak]:
    if not train or not held_out:
        return {}
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=CANDIDATES, num_perm=PERMUTATIONS)
    sets = [shingles(text_of(row)) for row in held_out]
    for number, words in enumerate(sets):
        index.insert(number, _sketch(words))
    found: dict[int, Leak] = {}
    for row in train:
        words = shingles(text_of(row))
        for number in index.query(_sketch(words)):
            similarity = jaccard(words, sets[number])
            if similarity >= NEAR and (number not in found or similarity > found[number].similarity):
                found[number] = Leak(held_out[number], row, near=True, similarity=similarity)
    return found


def text_of(row: Row) -> str:
    """What a row says in all: its prompt and the answer that is wanted, of an unwanted answer that one."""
    parts = []
    for sequence in wanted_sequences([row]) or sequences([row]):
        if isinstance(sequence, PlainText):
            parts.append(sequence.text)
        elif isinstance(sequence, Example):
            parts += [turn.content for turn in sequence.turns]
    return folded("\n".join(parts))


def shingles(text: str) -> frozenset[str]:
    """The word triples of a folded text; of one without spaces its runs of 8 letters."""
    words = text.split()
    if not words or len(text) / len(words) > LONG_WORD:
        return frozenset(text[i : i + LETTERS] for i in range(max(1, len(text) - LETTERS + 1)))
    return frozenset(" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1)))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


def _sketch(words: Iterable[str]) -> Any:
    from datasketch import MinHash
    from xxhash import xxh32_intdigest

    sketch = MinHash(num_perm=PERMUTATIONS, hashfunc=xxh32_intdigest, permutations=_permutations(), scheme=SCHEME)
    sketch.update_batch([word.encode("utf-8", "surrogatepass") for word in words])
    return sketch


@cache
def _permutations() -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, seed=1, scheme=SCHEME).permutations
