"""The checks of the adapter formats: each file read back by its consumer's own rules, and held against the trained one.

    the trained adapter ── PeftReading (PEFT's rules) ──▶ (out, in) of each matrix, float64 ─┐
    the exported file ── a reader by the consumer's rules ──▶ the same ──────────────────────┴─▶ compared

The readers (`adapters.verify.engine_reading`, `peft_reading`) share no code with the writers. vLLM and SGLang need a
GPU and are not run here.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from adapters.adapter_files import COMPACT_WEIGHTS
from adapters.chat_template import TEMPLATE, own_template
from adapters.checkpoint import read_config, read_index
from adapters.compact import to_standard
from adapters.errors import AdapterFileError, listed
from adapters.export import Options, Source
from adapters.fingerprint import fingerprint
from adapters.layouts import ExpertLayout, layout_for
from adapters.sidecar import read_sidecar
from adapters.verify import Check, Evidence
from adapters.verify.behaviour import LIMITS, behaviour_not_run, check_behaviour
from adapters.verify.engine_reading import EXPERT, STACK, FormFile, Reader, per_expert, sglang_3d, vllm_3d
from adapters.verify.fresh import FreshProcessError, ask_stock
from adapters.verify.peft_reading import Pair, PeftReading

USED, SAME, RANKS, NAMES, BESIDE, LOADED = (
    "adapter: every factor used",
    "adapter: the change of every matrix",
    "adapter: one rank, every expert",
    "adapter: names of the base's files",
    "adapter: the sidecar",
    "loads in stock PEFT",
)
CLOSE = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}
"""How far a value may be off, as a part of the matrix's largest: factors and folded scales are rounded once."""

# -------------------------------------------------------------------- the trained adapter, by PEFT's rules


class Trained:
    """The change of every matrix as it was trained, (out, in) in float64, gate before up in a fused one."""

    def __init__(self, adapter: Path, base: Path, layout: ExpertLayout):
        self.reading, self.layout = PeftReading(adapter, base), layout

    def stacks(self) -> list[Pair]:
        return [pair for pair in self.reading.pairs.values() if len(pair.shape) == 3]

    def matrices(self) -> list[Pair]:
        return [pair for pair in self.reading.pairs.values() if len(pair.shape) == 2]

    def linear(self, pair: Pair) -> Tensor:
        first, second = self.reading.factors(pair)
        return pair.scale * (second.double() @ first.double())

    def experts(self, pair: Pair) -> Callable[[int], Tensor]:
        left, right = self.reading.stacked(pair)

        def delta(expert: int) -> Tensor:
            found = pair.scale * (left[expert].double() @ right[expert].double())
            found = found.t() if self.layout.stack_order == "in_out" else found
            fused = self.layout.interleaved and pair.parameter.endswith("gate_up_proj")
            return torch.cat([found[::2], found[1::2]]) if fused else found

        return delta


class Readable(Protocol):
    """An exported file, whatever its form."""

    keys: frozenset[str]

    def linear(self, name: str) -> Tensor: ...

    def unused(self) -> list[str]: ...


F = TypeVar("F", bound=Readable)


def compare(file: F, trained: Trained, reader: Callable[[F, str, int, int], Tensor], limit: float) -> list[Check]:
    """Every matrix of the trained adapter, expert by expert, and every tensor of the file."""
    worst, where, matrices, problems = 0.0, "", 0, []
    for pair in (*trained.matrices(), *trained.stacks()):
        stacked = len(pair.shape) == 3
        wanted_of = trained.experts(pair) if stacked else None
        for expert in range(pair.shape[0] if stacked else 1):
            wanted = wanted_of(expert) if wanted_of else trained.linear(pair)
            try:
                found = reader(file, pair.parameter, expert, pair.shape[0]) if stacked else file.linear(pair.parameter)
            except (AdapterFileError, RuntimeError) as error:
                problems.append(f"{pair.parameter} of expert {expert}: {error}" if stacked else str(error))
                continue
            off = _off(found, wanted)
            worst, where = max((worst, where), (off, f"{pair.parameter}[{expert}]" if stacked else pair.parameter))
            matrices += 1
    unused = [f"{key} is used for nothing" for key in file.unused()] if not problems else []
    measured = {"largest_difference": worst, "limit": limit, "matrices": matrices, "where": where}
    right = worst <= limit and not problems
    detail = f"{matrices} matrices; the largest difference is {worst:.1e} of a matrix's largest value"
    detail += f" ({where})" if worst else ""
    return [
        _judged(USED, problems + unused, f"{len(file.keys)} tensors"),
        Check(SAME, "passed" if right else "failed", detail, measured),
    ]


def _off(found: Tensor, wanted: Tensor, largest: float | None = None) -> float:
    """The largest difference as a part of `largest`, that of `wanted` where none is given."""
    if found.shape != wanted.shape or not torch.isfinite(found).all():
        return float("inf")
    largest = float(wanted.abs().max()) if largest is None else largest
    difference = float((found - wanted).abs().max())
    return difference / largest if largest else difference


def _judged(name: str, problems: list[str], fine: str) -> Check:
    return Check(name, "failed" if problems else "passed", listed("wrong", problems, 8) if problems else fine)


# -------------------------------------------------------------------- what else the engines want


def check_ranks(file: FormFile, experts: int) -> Check:
    """SGLang copies factors into buffers of exactly r; vLLM wants gate, up and down of every expert of a layer."""
    problems = []
    for key in sorted(key for key in file.keys if key.endswith(".lora_A.weight")):
        shape, stack = file.shapes[key], STACK.match(key)
        rows = shape[-2] // experts if stack and len(shape) == 2 else shape[-2]
        if rows != file.rank:
            problems.append(f"{key} has rank {rows}, adapter_config.json says {file.rank}")
    layers = {where[0] for where in file.pairs if where[1] is not None}
    wanted = [(layer, expert, part) for layer in sorted(layers) for expert in range(experts) for part in range(3)]
    problems += [
        f"layer {where[0]}, expert {where[1]}: a part is missing" for where in wanted if where not in file.pairs
    ]
    if abs(file.scale - 1) > 1e-12:
        problems.append(f"alpha / r is {file.scale}: vLLM before 2026-09 scaled experts by another rule than the rest")
    return _judged(RANKS, problems, f"rank {file.rank} everywhere, scale 1")


def check_names(file: FormFile, base: Path) -> Check:
    """Every pair is called as a tensor of the base's files; experts where the files hold each on its own."""
    index = read_index(base)
    single = any(re.search(r"\.experts\.\d+\.", key) for key in index)
    problems = []
    for key in sorted(key for key in file.keys if key.endswith(".lora_A.weight")):
        tensor = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
        expert = EXPERT.match(key)
        if STACK.match(key) or (expert and not single):
            continue
        if tensor not in index:
            problems.append(f"{key}: the base has no {tensor}")
    return _judged(NAMES, problems, "every matrix is one of the base's files")


def check_beside(directory: Path, name: str, source: Source) -> Check:
    """The sidecar names the form, the base as it is, and the peft that wrote the file."""
    sidecar, problems = read_sidecar(directory), []
    if sidecar is None:
        return Check(BESIDE, "failed", "studio_adapter.json is missing")
    if sidecar.format != name:
        problems.append(f"format is {sidecar.format!r}, expected {name!r}")
    if dict(sidecar.base or {}) != fingerprint(source.base):
        problems.append("base is not the fingerprint of the base")
    if not (sidecar.peft_version and sidecar.experts.get("orientation") and sidecar.experts.get("packing")):
        problems.append("peft_version, orientation or packing is not stated")
    template = own_template(source.adapter)
    if template and not ((own := own_template(directory)) and own.read_bytes() == template.read_bytes()):
        problems.append(f"{TEMPLATE} is not the one that the adapter was trained with")
    left_out = f"; not for {', '.join(sidecar.ignored_by)}" if sidecar.ignored_by else ""
    return _judged(BESIDE, problems, f"for {', '.join(sidecar.made_for)}{left_out}")


# -------------------------------------------------------------------- formats


def check_per_expert(directory: Path, source: Source, evidence: Evidence, options: Options) -> list[Check]:
    """The format "per-expert". Where it is made for PEFT too, that is run."""
    checks, file = _engine_checks(directory, source, options, "per-expert", per_expert)
    checks.append(check_names(file, source.base))
    if (sidecar := read_sidecar(directory)) and "peft" in sidecar.made_for:
        checks += check_in_peft(directory, source, evidence, options.dtype)
    return [*checks, *_not_run("vLLM", "SGLang")]


def check_vllm_3d(directory: Path, source: Source, evidence: Evidence, options: Options) -> list[Check]:
    """The format "vllm-3d"."""
    checks, file = _engine_checks(directory, source, options, "vllm-3d", vllm_3d)
    return [*checks, check_names(file, source.base), *_not_run("vLLM")]


def check_sglang_3d(directory: Path, source: Source, evidence: Evidence, options: Options) -> list[Check]:
    """The format "sglang-3d"."""
    checks, file = _engine_checks(directory, source, options, "sglang-3d", sglang_3d)
    return [*checks, check_names(file, source.base), *_not_run("SGLang")]


def _engine_checks(
    directory: Path, source: Source, options: Options, name: str, reader: Reader
) -> tuple[list[Check], FormFile]:
    layout = _layout(source.base)
    file, trained = FormFile(directory, layout), Trained(_adapter(source), source.base, layout)
    experts = next((pair.shape[0] for pair in trained.stacks()), 0)
    checks = compare(file, trained, reader, CLOSE[options.dtype or "float32"])
    return [*checks, check_ranks(file, experts), check_beside(directory, name, source)], file


def _not_run(*engines: str) -> list[Check]:
    why = "is not run here: the file was read back by its rules instead"
    return [Check(f"behaviour in {engine}", "not run", f"{engine} {why}") for engine in engines]


def check_peft(directory: Path, source: Source, evidence: Evidence, options: Options) -> list[Check]:
    """The format "peft": read by PEFT's rules, and run by stock PEFT."""
    return [
        *check_standard(directory, source, options.dtype),
        check_beside(directory, "peft", source),
        *check_in_peft(directory, source, evidence, options.dtype),
    ]


def check_compact(directory: Path, source: Source, evidence: Evidence, options: Options) -> list[Check]:
    """The format "compact": brought back to the standard form, which is checked as such."""
    if not (directory / COMPACT_WEIGHTS).is_file():
        return [Check(USED, "failed", f"{COMPACT_WEIGHTS} is missing")]
    with tempfile.TemporaryDirectory(prefix="studio-compact-") as folder:
        standard = Path(folder) / "standard"
        to_standard(directory, standard)
        return [
            *check_standard(standard, source, options.dtype),
            check_beside(directory, "compact", source),
            *check_in_peft(standard, source, evidence, options.dtype),
        ]


def check_standard(directory: Path, source: Source, dtype: str | None) -> list[Check]:
    """The standard form against the trained adapter, both by PEFT's rules, in the axes of the stock parameters."""
    before, after = PeftReading(_adapter(source), source.base), PeftReading(directory, source.base)
    return [check_used(after, [before]), check_sum(after, [(1.0, before)], CLOSE[dtype or "float32"])]


def check_used(after: PeftReading, before: Sequence[PeftReading]) -> Check:
    """Every tensor of the file is a factor, and what one of the adapters `before` changes has factors in it."""
    wanted = {name: None for reading in before for name in reading.pairs}
    problems = [f"{name} is not in the file" for name in wanted if name not in after.pairs]
    problems += [f"{key} is used for nothing" for key in after.unused()]
    return _judged(USED, problems, f"{len(after.keys)} tensors")


def check_sum(after: PeftReading, before: Sequence[tuple[float, PeftReading]], limit: float) -> Check:
    """Every change in the file is the weighted sum of those of the adapters `before`, value by value."""
    worst, where, matrices = 0.0, "", 0
    for name, expert in matrices_of(after):
        found, changes = after.delta(after.pairs[name], expert).double(), changes_of(before, name, expert)
        matrices += 1
        wanted = sum(changes, torch.zeros_like(found))
        off = _off(found, wanted, sum(float(change.abs().max()) for change in changes))
        worst, where = max((worst, where), (off, name if expert is None else f"{name}[{expert}]"))
    measured = {"largest_difference": worst, "limit": limit, "matrices": matrices, "where": where}
    detail = f"{matrices} matrices; the largest difference is {worst:.1e} of a matrix's largest value"
    detail += f" ({where})" if worst else ""
    return Check(SAME, "passed" if worst <= limit else "failed", detail, measured)


def matrices_of(reading: PeftReading) -> Iterator[tuple[str, int | None]]:
    """(parameter, expert) of every matrix that an adapter has factors for."""
    for name, pair in reading.pairs.items():
        for expert in range(pair.shape[0]) if len(pair.shape) == 3 else (None,):
            yield name, expert


def changes_of(before: Sequence[tuple[float, PeftReading]], name: str, expert: int | None) -> list[Tensor]:
    """What each adapter that has the parameter adds to one matrix, weighted, float64."""
    found = ((weight, reading, reading.pairs.get(name)) for weight, reading in before)
    return [weight * reading.delta(pair, expert).double() for weight, reading, pair in found if pair is not None]


def check_in_peft(directory: Path, source: Source, evidence: Evidence, dtype: str | None) -> list[Check]:
    """Loads the adapter on the base in stock PEFT, in a fresh process, and compares what it says."""
    if evidence.logits is None:
        why = evidence.why_none or "no evidence was made"
        return [Check(LOADED, "not run", why), *behaviour_not_run(why)]
    with tempfile.TemporaryDirectory(prefix="studio-logits-") as folder:
        logits = Path(folder) / "logits.safetensors"
        question = {"model": source.base, "adapter": directory, "prompts": evidence.prompts, "logits": logits}
        try:
            answer = ask_stock("stock_peft.py", question)
        except FreshProcessError as error:
            return [Check(LOADED, "failed", str(error))]
        program = f"stock PEFT {answer['version']}"
        loaded = Check(LOADED, "passed", f"{answer['parameters']:,} parameters", {"peft": answer["version"]})
        return [loaded, *check_behaviour(evidence, logits, LIMITS[dtype or "float32"], program)]


def _layout(base: Path) -> ExpertLayout:
    return layout_for(read_config(base), read_index(base))


def _adapter(source: Source) -> Path:
    if source.adapter is None:
        raise AdapterFileError("this form is of an adapter, and none was given")
    return source.adapter
