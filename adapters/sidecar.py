"""What PEFT's files do not say of an adapter, in a file beside them: for which base it is and how its experts lie.

adapter/studio_adapter.json      written with every adapter; other programs pass over it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adapters.checkpoint import read_json_object
from adapters.errors import AdapterFileError
from adapters.fingerprint import PARTS, fingerprint

SIDECAR = "studio_adapter.json"
VERSION = 1

FORMS: dict[str, dict[str, Any]] = {
    "peft": {
        "packing": "lora_A (E·r, ·) expert-major; lora_B (·, r·E) rank-major; gate and up fused",
        "made_for": ("transformers", "peft"),
        "ignored_by": ("vllm", "sglang", "llama.cpp"),
    },
    "compact": {
        "packing": "rows of each expert's own rank, one expert after the other, ranks in metadata; gate and up fused",
        "made_for": ("moe-studio",),
        "ignored_by": (),
    },
}
"""What the sidecar says of the two forms that one becomes the other of."""


@dataclass(frozen=True)
class Sidecar:
    """Facts of one adapter directory.

    Attributes:
        format: of the files, a name in `adapters.export.EXPORTERS`: "peft", "per-expert", …
        base_name: what the base was called at training.
        base: its `adapters.fingerprint.fingerprint`; None where it is not known.
        held: how training held the base: {"quantization", "int8_experts", "double_quant", "dtype"}; None if not known.
        model_type: the family, a name in `adapters.layouts.LAYOUTS`.
        experts: {"count": E, "orientation": …, "packing": …} of the experts' factors in these files.
        made_for: programs that load these files. ignored_by: programs that load them and leave the experts out.
        start: where training began, of `adapters.placement.STARTS`. Other than at "zero" the file holds twice the rank:
            the trained factors first, then, with its B negative, what they began with.
    """

    format: str
    base_name: str
    base: Mapping[str, str] | None
    held: Mapping[str, Any] | None
    peft_version: str
    model_type: str
    experts: Mapping[str, Any]
    made_for: tuple[str, ...] = ()
    ignored_by: tuple[str, ...] = ()
    start: str = "zero"

    @property
    def held_elsewhere(self) -> Mapping[str, Any] | None:
        """`held`, for a file that holds these factors in another order: None where the halves count (LoftQ)."""
        return None if self.start == "loftq" else self.held

    @property
    def held_quantized(self) -> dict[str, Any] | None:
        """`held`, where training quantised anything of the base: all of it, or some experts alone."""
        held = dict(self.held or {})
        return held if held.get("quantization") not in (None, "none") or held.get("int8_experts") else None


def in_form(sidecar: Sidecar, form: str) -> Sidecar:
    """The sidecar of the same adapter in another of FORMS."""
    facts = FORMS[form]
    experts = {**sidecar.experts, "packing": facts["packing"]}
    return replace(sidecar, format=form, experts=experts, made_for=facts["made_for"], ignored_by=facts["ignored_by"])


def write_sidecar(directory: Path, sidecar: Sidecar) -> None:
    text = json.dumps({"version": VERSION, **asdict(sidecar)}, indent=2, ensure_ascii=False)
    (directory / SIDECAR).write_text(text + "\n", encoding="utf-8")


def read_sidecar(directory: Path) -> Sidecar | None:
    """The sidecar of an adapter; None where there is none, as with adapters that others wrote.

    Raises:
        AdapterFileError: unreadable, or of a version that this studio does not know.
    """
    file = directory / SIDECAR
    if not file.is_file():
        return None
    found = read_json_object(file, AdapterFileError)
    version = found.pop("version", None)
    if version != VERSION:
        raise AdapterFileError(f"{file} is of version {version!r}; this studio reads version {VERSION}")
    if wrong := _wrong_fields(found):
        raise AdapterFileError(f"{file} is no whole sidecar: {'; '.join(wrong)}")
    try:
        return Sidecar(**{**found, **{name: tuple(found[name]) for name in ("made_for", "ignored_by")}})
    except (KeyError, TypeError) as error:
        raise AdapterFileError(f"{file} is no whole sidecar: {error}") from None


TYPES: dict[str, tuple[type | None, ...]] = {
    **dict.fromkeys(("format", "base_name", "peft_version", "model_type", "start"), (str,)),
    **dict.fromkeys(("base", "held"), (dict, None)),
    "experts": (dict,),
    **dict.fromkeys(("made_for", "ignored_by"), (list,)),
}
"""What JSON holds in each field; None: it may be null."""


def _wrong_fields(found: Mapping[str, Any]) -> list[str]:
    wrong = {name for name, types in TYPES.items() if name in found and not _is_one(found[name], types)}
    lists = {name: found.get(name, ()) for name in ("made_for", "ignored_by") if name not in wrong}
    wrong |= {name for name, value in lists.items() if not all(type(each) is str for each in value)}
    return [f"{name} is {found[name]!r}" for name in sorted(wrong)]


def _is_one(value: Any, types: tuple[type | None, ...]) -> bool:
    return None in types if value is None else type(value) in types


def check_base(sidecar: Sidecar, base: Path) -> list[str]:
    """Compares a base with the one that the adapter was trained on.

    Returns:
        Warnings: the tokenizer or the chat template differ, whose weights and config are the same.

    Raises:
        AdapterFileError: other weights, or another config: the adapter is for another model.
    """
    if sidecar.base is None:
        return []
    now = fingerprint(base)
    changed = [part for part in PARTS if sidecar.base.get(part) != now[part]]
    if {"weights", "config"} & set(changed):
        raise AdapterFileError(
            f"the adapter was trained on {sidecar.base_name}, and {base} differs from it in its "
            f"{' and '.join(changed)}: another model, or the same one changed since. Give the base that it was trained "
            "on (--base)"
        )
    return [f"the base's {part.replace('_', ' ')} has changed since the training" for part in changed]
