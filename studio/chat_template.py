"""The chat template of a base: found, or a family's default; rendered in a limited child; checked on the user's rows.

    TemplateRenderer(base).render(turns)     text, or CheckpointError
    rendered_rows(recipe)                    before any work: every row renders within limits, or is named
    template_warnings(base, sequences)       what a plan says about it

A template comes with the checkpoint, so it is a stranger's program: whatever rows a job trains on are rendered once in
the child, with limits of memory and time, before the job renders them itself.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.checkpoint import read_json_object
from adapters.errors import CheckpointError
from adapters.verify.tokenizer import named_ends
from studio.data import Example, PlainText, Preference, RecipeRows, Row, recipe_rows, sequences
from studio.data import Sequence as Encodable
from studio.data.lengths import problem_of, too_long
from studio.data.of_recipe import refused
from studio.data.reading import refuse
from studio.data.rows import as_turns
from studio.default_templates import default_template
from studio.errors import Problem
from studio.models import resolve_base

if TYPE_CHECKING:
    from studio.recipe import Recipe

PROGRAM = Path(__file__).with_name("render_template.py")
MEMORY_BYTES = 2 * 2**30
"""Address space of the child; Python with transformers' renderer takes 0.4 GB of it."""

SECONDS = 20.0
"""For one conversation: a template writes megabytes in less."""

START_SECONDS = 120.0
"""For the child to start: half a second on an idle machine."""

BROKEN = ("TemplateSyntaxError", "SecurityError")
"""Errors of a template that no conversation is to blame for."""

EARLIER_TURN = (
    "this model's chat template writes an assistant's turn differently once others follow it, so that it cannot be "
    "learned; set training.loss_on to completion, or split the conversation"
)
CUT_ALIKE = (
    "chosen and rejected are the same once both are cut to data.max_length_tokens, {}; raise it, or leave the pair out"
)
SAMPLED_ROWS = 64
"""Rows that a plan renders."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template's text, and whether the studio gave it because the checkpoint has none."""

    text: str
    is_default: bool


def chat_template(base: Path) -> ChatTemplate:
    """The template of the model in the directory `base`.

    Raises:
        CheckpointError: it names several templates and none of them "default".
    """
    file = base / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), False)
    config = base / "tokenizer_config.json"
    found = read_json_object(config).get("chat_template") if config.is_file() else None
    if isinstance(found, list):  # several, by name: the older form
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        if not isinstance(found := named.get("default"), str):
            names = ", ".join(map(str, named)) or "none"
            raise CheckpointError(base, [f"its chat templates are {names}; expected one called default"])
    if isinstance(found, str) and found:
        return ChatTemplate(found, False)
    return ChatTemplate(default_template(_vocabulary(base), _model_type(base)), True)


def _model_type(base: Path) -> str:
    return str(read_json_object(base / "config.json").get("model_type", ""))


def _vocabulary(base: Path) -> frozenset[str]:
    """The texts of the tokens that stand for themselves (special and added ones)."""
    added = read_json_object(base / "tokenizer.json").get("added_tokens", [])
    return frozenset(token["content"] for token in added if isinstance(token, dict) and "content" in token)


def special_tokens(base: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` and their kin, as templates name them."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        values = read_json_object(base / name) if (base / name).is_file() else {}
        for key, value in values.items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                found[key] = text
    return found


class _RefusedError(CheckpointError):
    """The template refuses one conversation; the child lives on."""

    def __init__(self, base: Path, said: str):
        self.said = said.removeprefix("TemplateError: ")  # raise_exception's own class says nothing more
        super().__init__(base, [f"its chat template refuses a conversation: {said}"])


class TemplateRenderer:
    """A child process that renders one model's template; a context manager.

    Raises:
        CheckpointError: of `render`: the template refuses the conversation, fails, takes over `SECONDS`, or needs more
            than `MEMORY_BYTES`. After the last two the child is gone, and the renderer must not be used again.
    """

    def __init__(self, base: Path, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES):
        self.base, self.seconds = base, seconds
        self.template = chat_template(base)
        setting = {
            "template": self.template.text,
            "special_tokens": special_tokens(base),
            "memory_bytes": memory_bytes,
        }
        self.child = subprocess.Popen(
            [sys.executable, "-I", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        self._send(setting)
        self._line(START_SECONDS)

    def __enter__(self) -> TemplateRenderer:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.child.communicate()

    def render(self, turns: list[dict[str, Any]], tools: Sequence[Any] = (), answer: bool = False) -> str:
        """The text of a conversation; with `answer`, up to where the assistant's next turn begins."""
        self._send({"turns": turns, "tools": list(tools) or None, "answer": answer})
        said = json.loads(self._line(self.seconds))
        if "error" in said:
            said = str(said["error"])
            if said.startswith(BROKEN):
                raise CheckpointError(self.base, [f"its chat template refuses a conversation: {said}"])
            raise _RefusedError(self.base, said)
        return str(said["text"])

    def _send(self, value: dict[str, Any]) -> None:
        assert self.child.stdin is not None
        try:
            self.child.stdin.write(json.dumps(value).encode() + b"\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            raise self._gone("ended") from None

    def _line(self, seconds: float) -> bytes:
        assert self.child.stdout is not None
        if not select.select([self.child.stdout], [], [], seconds)[0]:
            self.child.kill()
            raise self._gone(f"took over {seconds:g} s for one conversation")
        line = self.child.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._gone("ended, most likely for want of memory")
        return line

    def _gone(self, how: str) -> CheckpointError:
        return CheckpointError(self.base, [f"its chat template cannot be used: the process that renders it {how}"])


@dataclass(frozen=True)
class Rendered:
    """One sequence as text: the prompt up to where the answer starts, and the whole; of a prompt alone both are it."""

    prompt: str
    whole: str


def rendered(renderer: TemplateRenderer, sequence: Encodable) -> Rendered:
    """What a model reads of a sequence.

    Raises:
        CheckpointError: as `TemplateRenderer.render`; or the whole does not begin with the prompt, so that nobody
            could say which tokens are the answer.
    """
    if isinstance(sequence, PlainText):
        return Rendered("", sequence.text)
    row = sequence.as_row()
    return _rendered(renderer, row["prompt"], row["completion"], row.get("tools", ()))


def _rendered(renderer: TemplateRenderer, prompt: list[Any], completion: list[Any], tools: Sequence[Any]) -> Rendered:
    asked = renderer.render(prompt, tools, answer=True)
    if not completion:
        return Rendered(asked, asked)
    whole = renderer.render([*prompt, *completion], tools)
    if not whole.startswith(asked):
        problem = (
            "its chat template writes a prompt differently once the answer follows: nobody could say what is learned"
        )
        raise CheckpointError(renderer.base, [problem])
    return Rendered(asked, whole)


def rendered_rows(recipe: Recipe) -> RecipeRows:
    """The recipe's rows, of the held-out ones as many as are evaluated, each rendered once.

    Raises:
        CheckpointError: the template does not stand the rows.
        DataError: as `recipe_rows`; and, under `data.bad_rows: refuse`, what `check_rendered` says of the rows.
    """
    found, base, limit = recipe_rows(recipe), resolve_base(recipe.model.base), recipe.data.max_length_tokens
    earlier = recipe.training.loss_on == "assistant"
    held_out = found.held_out[: recipe.evaluation.examples]
    (train, bad), (held_out, bad_held_out) = (
        check_rendered(base, rows, limit, earlier_turns=earlier) for rows in (found.train, held_out)
    )
    refuse([refused(recipe, train, bad), refused(recipe, held_out, bad_held_out)])
    return replace(found, train=train, held_out=held_out, dropped=(*found.dropped, *bad, *bad_held_out))


def check_rendered(
    base: Path,
    rows: Sequence[Row],
    max_length_tokens: int,
    progress: Callable[[int, int], None] | None = None,
    earlier_turns: bool = False,
) -> tuple[list[Row], list[Problem]]:
    """Renders every row in the limited child, and counts the tokens of its prompt.

    Args:
        earlier_turns: the assistant's earlier turns are learned too.

    Returns:
        The rows that can be trained on, and what is wrong with the others: the template refuses the conversation, or
        the prompt alone fills `max_length_tokens`, so that nothing of the answer would be learned; or it writes an
        earlier turn, where those are learned, otherwise once others follow it; or both sides of a pair are the same
        where they are cut.

    Raises:
        CheckpointError: the template does not stand the rows.
    """
    tokenizer = _tokenizer(base)
    good: list[Row] = []
    problems: list[Problem] = []
    with TemplateRenderer(base) as renderer:
        for number, row in enumerate(rows, 1):
            problem = _row_problem(renderer, tokenizer, row, max_length_tokens)
            if earlier_turns and not problem:
                problem = _turn_problem(renderer, row)
            if problem:
                problems.append(problem)
            else:
                good.append(row)
            if progress:
                progress(number, len(rows))
    return good, problems


def _row_problem(renderer: TemplateRenderer, tokenizer: Any, row: Row, max_length_tokens: int) -> Problem | None:
    try:
        sides = [rendered(renderer, side) for side in sequences([row])]
    except _RefusedError as error:
        return problem_of(row, "", f"the chat template refuses the conversation: {error.said}")
    tokens = len(tokenizer.encode(sides[0].prompt, add_special_tokens=False).ids)
    if tokens >= max_length_tokens:
        return problem_of(row, "prompt", too_long(tokens, max_length_tokens))
    if isinstance(row, Preference) and _cut_alike(tokenizer, sides, max_length_tokens):
        return problem_of(row, "", CUT_ALIKE.format(max_length_tokens))
    return None


def _cut_alike(tokenizer: Any, sides: Sequence[Rendered], max_length_tokens: int) -> bool:
    if min(len(side.whole.encode()) for side in sides) < max_length_tokens:  # a token is a byte at least: none is cut
        return False
    one, other = (tokenizer.encode(side.whole, add_special_tokens=False).ids[:max_length_tokens] for side in sides)
    return bool(one == other)


def _turn_problem(renderer: TemplateRenderer, row: Row) -> Problem | None:
    """An assistant's turn in the prompt that cannot be told from the rest: `studio.encoding` needs it as it was."""
    for example in sequences([row]):
        learned = _earlier_turns(example) if isinstance(example, Example) else []
        if isinstance(example, Example) and learned:
            turns, tools = as_turns(example.turns), [dict(tool) for tool in example.tools]
            whole = renderer.render(turns, tools)
            for number in learned:
                before = renderer.render(turns[:number], tools, answer=True)
                after = renderer.render(turns[: number + 1], tools)
                if not (whole.startswith(after) and after.startswith(before)):
                    return problem_of(row, "", EARLIER_TURN)
    return None


def _earlier_turns(example: Example) -> list[int]:
    return [number for number, turn in enumerate(example.prompt) if turn.role == "assistant" and turn.learned]


def template_warnings(base: Path, rows: Sequence[Encodable]) -> tuple[str, ...]:
    """What to know of the template before a job: a default that was taken, answers without an end-of-turn token.

    Raises:
        CheckpointError: the template does not stand the first rows.
    """
    template, stops = chat_template(base), stop_tokens(base)
    sample = [row for row in rows[:SAMPLED_ROWS] if isinstance(row, Example)]
    asked = json.dumps([row.as_row() for row in sample])  # text, by which the answer can be kept
    found = []
    if template.is_default:
        found.append(
            "the base has no chat template: the default of its family is used, written beside the adapter as "
            "chat_template.jinja; whoever runs the model needs it"
        )
    wholes, refused_rows = _wholes(base, template.text, asked)
    if refused_rows:
        found.append(
            f"the chat template refuses {len(refused_rows)} of the first {len(sample)} conversations: "
            f"{refused_rows[0]}. The job names each by its line before it loads the base, and refuses or drops it as "
            "data.bad_rows says"
        )
    unended = [text for text in wholes if not text.rstrip().endswith(tuple(stops))]
    if unended:
        ends, last = ", ".join(map(repr, stops)) or "none is named", unended[0].rstrip()[-16:]
        found.append(
            f"{len(unended)} of {len(sample)} answers end with {last!r} and not with a token at which the model stops "
            f"({ends}): the tuned model may write on and on. Add that token to eos_token_id in the base's "
            "generation_config.json, or name it as a stop string where the model is served"
        )
    return tuple(found)


@lru_cache(maxsize=16)
def _wholes(base: Path, template: str, rows: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The rows as text, and why others are refused; kept, because the browser plans with every change of a form."""
    wholes: list[str] = []
    refused_rows: list[str] = []
    with TemplateRenderer(base) as renderer:
        for row in json.loads(rows):
            try:
                wholes.append(_rendered(renderer, row["prompt"], row["completion"], row.get("tools", ())).whole)
            except _RefusedError as error:
                refused_rows.append(error.said)
    return tuple(wholes), tuple(refused_rows)


def stop_tokens(base: Path) -> tuple[str, ...]:
    """The texts of the tokens at which generation stops: generation_config.json's, config.json's, the tokenizer's."""
    named = named_ends(base)
    ids = named["generation_config.json"] or named["config.json"] or []
    texts = map(_tokenizer(base).id_to_token, ids if isinstance(ids, list) else [ids])
    eos = special_tokens(base).get("eos_token")
    return tuple(dict.fromkeys(text for text in (*texts, eos) if text))


@lru_cache(maxsize=4)
def _tokenizer(base: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(base / "tokenizer.json"))
