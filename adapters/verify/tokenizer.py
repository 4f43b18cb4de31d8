"""An export's tokenizer, chat template and end-of-sequence tokens, against the base's. No torch.

Ids are computed by stock transformers in a process of its own, of both directories alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.chat_template import TEMPLATE as TEMPLATE_FILE
from adapters.chat_template import own_template
from adapters.checkpoint import read_json_object, text_config
from adapters.verify import Check
from adapters.verify.fresh import FreshProcessError, ask_stock

if TYPE_CHECKING:
    from adapters.export import Source

NASTY = (
    "",
    " ",
    "   three  spaces   inside   ",
    "\n\n\tTabs\tand\r\nCRLF\n",
    "Don't can't I'LL we've IT'S",
    "naïve café Zürich",
    "e\u0301 (combining) vs é (one code point)",
    "日本語と中文 한국어",
    "مرحبا بالعالم, שלום",
    "हिन्दी ไทย",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇨🇭",
    "\u200b\u00a0\ufeff zero width, no-break",
    "3.14159 1,000,000 0x1F 12345678901234567890",
    "def f(x):\n    return x**2  # x² ≠ x",
    "https://example.org/a?b=c&d=%20#e",
    "</s><s>[INST]<|endoftext|><|im_end|><|eot_id|><|eot|>",
    "<unk><pad><0x0A>▁",
    "....????!!!!----____",
    "\u0000\u0007\u001b[0m",
    "ſ ﬁ Ⅷ ½ ＡＢＣ",
    "aAbB" * 50,
)
"""Strings on which tokenizers that look alike differ."""

CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hello, wörld!\n"}, {"role": "assistant", "content": " Good morning. "}],
    [
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And <|eot|> twice that?"},
        {"role": "assistant", "content": "4"},
    ],
)

IDS, TEMPLATE, ENDS = "tokenizer: ids", "tokenizer: chat template", "tokenizer: end of sequence"


def check_tokenizer(directory: Path, source: Source) -> list[Check]:
    """Ids of nasty strings and of conversations, the template's bytes, and EOS in all the places that name it."""
    base, template = source.base, own_template(source.adapter)
    if not any(has_tokenizer(path) for path in (base, directory)):
        return [Check(IDS, "not run", "the base has no tokenizer, nor has the export")]
    question = {
        "directories": [base, directory],
        "strings": NASTY,
        "conversations": CONVERSATIONS,
        "template": template,
    }
    try:
        before, after = ask_stock("stock_tokenizer.py", question)
    except FreshProcessError as error:
        return [Check(IDS, "failed", f"stock transformers cannot load the tokenizer: {error}")]
    return [_ids(before, after), _template(directory, base, template), check_ends(directory, base, before, after)]


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))


def _ids(before: Mapping[str, Any], after: Mapping[str, Any]) -> Check:
    pairs = zip(NASTY, before["ids"], after["ids"], strict=True)
    problems = [
        f"{text[:30]!r} gives {theirs[:8]}, the base {ours[:8]}" for text, ours, theirs in pairs if ours != theirs
    ]
    problems += [
        f"{name} is {after[name]}, the base's {before[name]}" for name in ("size",) if after[name] != before[name]
    ]
    if before["templated"] != after["templated"]:
        problems.append("conversations give other ids: " + (after["error"] or "another template"))
    told = f"{len(NASTY)} nasty strings and {len(before['templated'])} conversations give the base's ids"
    detail = "; ".join(problems[:5]) or f"{told} in stock transformers {after['version']}"
    return Check(IDS, "failed" if problems else "passed", detail, {"strings": len(NASTY), "size": after["size"]})


def template_bytes(directory: Path) -> dict[str, Any]:
    """Every place in which a model directory keeps a chat template, and its bytes."""
    found: dict[str, Any] = {file.name: file.read_bytes() for file in sorted(directory.glob("*chat_template*"))}
    config = directory / "tokenizer_config.json"
    inside = read_json_object(config).get("chat_template") if config.is_file() else None
    return found | ({"tokenizer_config.json": inside} if inside else {})


def _template(directory: Path, base: Path, template: Path | None) -> Check:
    before, after = template_bytes(base), template_bytes(directory)
    whose = "the adapter's" if template else "the base's"
    if template:
        before[TEMPLATE_FILE] = template.read_bytes()
    lost = [
        f"{name} is {'lost' if name not in after else 'not the same'}"
        for name in before
        if after.get(name) != before[name]
    ]
    extra = [f"{name} is not {whose}" for name in after if name not in before]
    detail = "; ".join(lost + extra) or (
        f"byte for byte {whose}" if before else "the base has none, nor has the export"
    )
    return Check(TEMPLATE, "failed" if lost or extra else "passed", detail, {"places": sorted(before)})


def named_ends(directory: Path) -> dict[str, Any]:
    """What config.json and generation_config.json call the end of a sequence: ids, a list of them, or None."""
    config = read_json_object(directory / "config.json")
    generation = directory / "generation_config.json"
    return {
        "config.json": text_config(config).get("eos_token_id", config.get("eos_token_id")),
        "generation_config.json": read_json_object(generation).get("eos_token_id") if generation.is_file() else None,
    }


def check_ends(directory: Path, base: Path, before: Mapping[str, Any], after: Mapping[str, Any]) -> Check:
    """The same EOS as the base's in each place, and agreement between the places.

    A disagreement that the base has too is told and let pass: the export is what it was.
    """
    places = {**named_ends(directory), "tokenizer": after["eos"]}
    expected = {**named_ends(base), "tokenizer": before["eos"]}
    problems = [
        f"{name} says {places[name]}, the base's {expected[name]}" for name in places if places[name] != expected[name]
    ]
    notes = disagreements(places, after["ends"])
    if problems or notes != disagreements(expected, before["ends"]):
        return Check(ENDS, "failed", "; ".join([*problems, *notes]), places)
    said = ", ".join(f"{name} {value}" for name, value in places.items())
    return Check(ENDS, "passed", "; ".join([said, *(f"as in the base, {note}" for note in notes)]), places)


def disagreements(places: Mapping[str, Any], template_ends: Sequence[Sequence[int]]) -> list[str]:
    """In what the places contradict one another: who generates stops at what generation_config says, else config."""
    stops = _as_set(places.get("generation_config.json")) or _as_set(places.get("config.json"))
    if not stops:
        return []
    notes = []
    if places["tokenizer"] is not None and places["tokenizer"] not in stops:
        notes.append(f"generation stops at {sorted(stops)}, which leaves out the tokenizer's EOS {places['tokenizer']}")
    if any(ends and not stops & set(ends) for ends in template_ends):
        notes.append(f"the chat template ends an answer with {template_ends[0]}, generation stops at {sorted(stops)}")
    return notes


def _as_set(value: Any) -> set[int]:
    return set() if value is None else set(value) if isinstance(value, list) else {value}
