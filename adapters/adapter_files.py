"""A PEFT adapter directory, read: names and shapes at first, the factors of a stack when they are asked for. No peft.

    read_adapter(directory, layout) ─▶ AdapterFile
        .linear[name]     LinearFactors     A (r, in), B (out, r)
        .experts[name]    ExpertFactors     A (E, r, in), B (E, out, r), whatever the family
        .shapes[name]     of the base tensor that each is for, by the files' headers alone

PEFT's file differs from the canonical form in three ways, all of them silent when wrong:

- `lora_A` is expert-major (E·r, ·) but the columns of `lora_B` are rank-major (·, r·E);
- keys do not name the parameter: with both adapted, `experts.base_layer` is gate_up_proj and `experts` down_proj;
- for a family with `layout.peft_swaps` (Llama 4), lora_A holds the output side and lora_B the input side.

PEFT before 0.19.1 decided the third otherwise, by version and by a patch of transformers, so a file of such a version
is read only where stacks that are not square show on which side its factors are.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from adapters.adapter_config import wrong_values
from adapters.checkpoint import TensorInfo, check_links, read_header, read_json_object
from adapters.errors import AdapterFileError, CheckpointError, listed
from adapters.layouts import PROJECTIONS, ExpertLayout
from adapters.sidecar import read_sidecar
from adapters.tensor_files import DTYPES, read_tensor, read_values

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
COMPACT_WEIGHTS = "compact_adapter.safetensors"  # of adapters.compact
PREFIX = "base_model.model."
MAGNITUDE = ".lora_magnitude_vector"
FIRST_RIGHT_PEFT = (0, 19, 1)
"""The first version whose sides of a 3-D parameter are those of `ExpertLayout.peft_swaps` (huggingface/peft #3165)."""

NOT_MERGED = (
    "modules_to_save",
    "lora_bias",
    "layer_replication",
    "fan_in_fan_out",
    "use_qalora",
    "alora_invocation_tokens",
    "trainable_token_indices",
)
"""Options of a LoRA whose merge is more than W + scale · B A: refused, not merged wrongly."""

CHECKED_VALUES = 1 << 22
"""Values of an adapter that are looked at together for NaN and infinity."""

KEPT_STACKS = 2
"""Stacks whose factors are in memory at a time: the two of a layer, which per-expert files use by turns."""

T = TypeVar("T")
StackSizes = Callable[[str], tuple[int, int]]
"""(out, in) of the experts of a stack in the base, by its name."""


@dataclass(frozen=True)
class ExpertFactors:
    """The LoRA of one projection of one layer's experts: expert e adds scale · B[e] A[e] to its (out, in) matrix.

    Attributes:
        A: (E, r, in). B: (E, out, r).
    """

    A: Tensor
    B: Tensor
    scale: float

    def delta(self, expert: int) -> Tensor:
        """(out, in) in float32."""
        return self.of(expert).delta()

    def of(self, expert: int) -> LinearFactors:
        """The LoRA of one expert's matrix."""
        return LinearFactors(self.A[expert], self.B[expert], self.scale)

    def adapts(self, expert: int) -> bool:
        """Whether the expert has an adapter: one that was given none is zero-filled in the file."""
        return bool(self.A[expert].any() or self.B[expert].any())


@dataclass(frozen=True)
class LinearFactors:
    """The LoRA of one matrix: adds scale · B A to its (out, in) weight. A: (r, in). B: (out, r).

    `magnitude` (out,) is that of a DoRA: the norm that each row has afterwards.
    """

    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None

    def delta(self) -> Tensor:
        """(out, in) in float32."""
        return self.scale * (self.B.float() @ self.A.float())


@dataclass(frozen=True)
class AdapterFile:
    """An adapter directory.

    Attributes:
        config: adapter_config.json.
        linear: by base weight key, e.g. `model.layers.0.self_attn.q_proj.weight`; read when asked for.
        experts: by stack key, e.g. `model.layers.0.feed_forward.experts.gate_up_proj`; read when asked for.
        shapes: (out, in), or (E, out, in) of a stack, by the same names.
    """

    config: dict[str, Any]
    linear: Mapping[str, LinearFactors]
    experts: Mapping[str, ExpertFactors]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def without_start(file: AdapterFile, layout: ExpertLayout) -> AdapterFile:
    """An adapter of twice the rank without its second half: what was trained, and not what it began with.

    Routers have no second half (adapters/starts.py).
    """
    routers = tuple(f"{module}.weight" for module in layout.class_modules("router"))

    def linear(name: str) -> LinearFactors:
        found = file.linear[name]
        rank = len(found.A) if name.endswith(routers) else len(found.A) // 2
        return LinearFactors(found.A[:rank], found.B[:, :rank], found.scale)

    def stack(name: str) -> ExpertFactors:
        found = file.experts[name]
        rank = found.A.shape[1] // 2
        return ExpertFactors(found.A[:, :rank], found.B[:, :, :rank], found.scale)

    return replace(
        file,
        linear=Lazy({name: partial(linear, name) for name in file.linear}, kept=KEPT_STACKS),
        experts=Lazy({name: partial(stack, name) for name in file.experts}, kept=KEPT_STACKS),
    )


class Lazy(Mapping[str, T], Generic[T]):
    """Values made when they are asked for, by any thread; the last `kept` of them stay."""

    def __init__(self, makers: Mapping[str, Callable[[], T]], kept: int):
        self._makers, self._kept = makers, kept
        self._made: OrderedDict[str, T] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> T:
        maker = self._makers[name]
        with self._lock:
            if name not in self._made:
                while len(self._made) >= self._kept:
                    self._made.popitem(last=False)  # before the next is made: only so many exist
                self._made[name] = maker()
            self._made.move_to_end(name)
            return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def to_peft(factors: ExpertFactors, layout: ExpertLayout) -> tuple[Tensor, Tensor]:
    """(lora_A, lora_B) as PEFT stores a stack: expert-major (E·r, ·) and rank-major (·, r·E)."""
    first, second = factors.A, factors.B.transpose(1, 2)
    if layout.peft_swaps:
        first, second = second, first
    experts, rank, _ = first.shape
    return first.reshape(experts * rank, -1), second.permute(2, 1, 0).reshape(-1, rank * experts)


def from_peft(lora_a: Tensor, lora_b: Tensor, rank: int, scale: float, layout: ExpertLayout) -> ExpertFactors:
    """The canonical form of a stack's (lora_A, lora_B)."""
    first = lora_a.reshape(-1, rank, lora_a.shape[1])
    second = lora_b.reshape(lora_b.shape[0], rank, -1).permute(2, 1, 0).contiguous()  # an expert's values together
    if layout.peft_swaps:
        first, second = second, first
    return ExpertFactors(A=first, B=second.transpose(1, 2), scale=scale)


@dataclass(frozen=True)
class _Pair:
    """The headers of one lora_A and lora_B, and what they are for."""

    name: str
    first: TensorInfo
    second: TensorInfo
    rank: int
    scale: float
    stack: bool
    magnitude: TensorInfo | None = None

    def problem(self) -> str | None:
        a, b = self.first.shape, self.second.shape
        if self.magnitude is not None and (self.stack or self.magnitude.shape != b[:1]):
            return f"{self.name}: lora_magnitude_vector is {self.magnitude.shape}, lora_B {b}"
        if len(a) == len(b) == 2 and a[0] == b[1] and (a[0] == self.rank or (self.stack and a[0] % self.rank == 0)):
            return None
        return f"{self.name}: lora_A is {a} and lora_B {b}: not of rank {self.rank}"

    def shape(self, layout: ExpertLayout) -> tuple[int, ...]:
        inputs, outputs = self.first.shape[1], self.second.shape[0]
        if not self.stack:
            return outputs, inputs
        sides = (inputs, outputs) if layout.peft_swaps else (outputs, inputs)
        return (self.first.shape[0] // self.rank, *sides)

    def linear(self) -> LinearFactors:
        magnitude = None if self.magnitude is None else read_tensor(self.magnitude)
        return LinearFactors(read_tensor(self.first), read_tensor(self.second), self.scale, magnitude)

    def experts(self, layout: ExpertLayout) -> ExpertFactors:
        return from_peft(read_tensor(self.first), read_tensor(self.second), self.rank, self.scale, layout)


def read_adapter(directory: Path, layout: ExpertLayout, sizes: StackSizes | None = None) -> AdapterFile:
    """Reads a standard PEFT LoRA directory, made here or by PEFT itself.

    Args:
        layout: of the base's family.
        sizes: of the base's stacks, for a file of an old PEFT; without them such a file is refused.

    Raises:
        AdapterFileError: files missing, not a LoRA, an option whose merge is not implemented, stray tensors, NaN, or
            stacks of an old PEFT whose sides cannot be told.
    """
    config = _read_config(directory)
    try:
        header, facts = read_header(directory / WEIGHTS)
    except (CheckpointError, OSError) as error:
        raise AdapterFileError(f"{directory / WEIGHTS} cannot be read: {error}") from None
    pairs, problems = _pairs(header, config, layout)
    problems += [f"{key} holds NaN or infinity" for key, info in header.items() if not _finite(info)]
    if problems or not pairs:
        raise AdapterFileError(listed(f"{directory / WEIGHTS} cannot be used", problems or ["it holds no tensors"]))
    stacks = [pair for pair in pairs if pair.stack]
    if stacks and not _right_version(config.get("peft_version") or facts.get("peft_version")):
        layout = _proven_sides(directory, config, stacks, layout, sizes)
    return AdapterFile(
        config,
        Lazy({f"{pair.name}.weight": pair.linear for pair in pairs if not pair.stack}, kept=KEPT_STACKS),
        Lazy({pair.name: partial(pair.experts, layout) for pair in stacks}, kept=KEPT_STACKS),
        {pair.name if pair.stack else f"{pair.name}.weight": pair.shape(layout) for pair in pairs},
    )


def _pairs(
    header: Mapping[str, TensorInfo], config: dict[str, Any], layout: ExpertLayout
) -> tuple[list[_Pair], list[str]]:
    pairs, problems = [], []
    for key in sorted(header):
        if key.endswith(".lora_B.weight"):
            if key.replace(".lora_B.", ".lora_A.") not in header:
                problems.append(f"{key} has no {key.replace('.lora_B.', '.lora_A.')}")
            continue
        if key.endswith(MAGNITUDE):
            if key.replace(MAGNITUDE, ".lora_A.weight") not in header or not config.get("use_dora"):
                problems.append(f"{key} belongs to no lora_A of a DoRA")
            continue
        partner = key.replace(".lora_A.", ".lora_B.")
        if not key.endswith(".lora_A.weight"):
            problems.append(f"{key} is not a LoRA factor")
        elif partner not in header:
            problems.append(f"{key} has no {partner}")
        else:
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            stack = module.removesuffix(".base_layer").endswith(f"{layout.block}.{layout.experts}")
            name = stack_key(module, config) if stack else module
            magnitude = header.get(f"{PREFIX}{module}{MAGNITUDE}")
            pair = _Pair(name, header[key], header[partner], *rank_and_scale(config, name), stack, magnitude)
            pairs.append(pair)
            if config.get("use_dora") and magnitude is None:
                problems.append(f"{key} has no lora_magnitude_vector, and use_dora is true")
            problems += [problem] if (problem := pair.problem()) else []
    return pairs, problems


def _finite(info: TensorInfo) -> bool:
    if not DTYPES[info.dtype].is_floating_point:
        return True
    starts = range(0, info.parameters, CHECKED_VALUES)
    pieces = (read_values(info, start, min(CHECKED_VALUES, info.parameters - start)) for start in starts)
    return all(bool(torch.isfinite(piece).all()) for piece in pieces)


def _right_version(version: str | None) -> bool:
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version or "")
    return found is not None and tuple(int(part or 0) for part in found.groups()) >= FIRST_RIGHT_PEFT


def _proven_sides(
    directory: Path, config: dict[str, Any], stacks: list[_Pair], layout: ExpertLayout, sizes: StackSizes | None
) -> ExpertLayout:
    """The layout with the sides on which the factors of an old PEFT's file lie, where its sizes leave no doubt."""
    found = set()
    for pair in stacks if sizes else ():
        outputs, inputs = sizes(pair.name)  # type: ignore[misc]
        sides = pair.second.shape[0], pair.first.shape[1]
        if outputs != inputs:
            found |= {swaps for swaps in (False, True) if sides == ((inputs, outputs) if swaps else (outputs, inputs))}
    if len(found) != 1:
        version = config.get("peft_version")
        raise AdapterFileError(
            f"{directory} was written by PEFT {version or '(no version recorded)'}, and before 0.19.1 lora_A and "
            "lora_B of expert stacks could be on either side: here the sizes do not tell on which, and a guess could "
            "be silently wrong. If a PEFT from 0.19.1 on wrote it, put its peft_version into adapter_config.json; else "
            "train the adapter again with such a version"
        )
    return replace(layout, peft_swaps=found.pop())


def stack_key(module: str, config: dict[str, Any]) -> str:
    """The parameter that a stack's key means; PEFT nests the wrappers, gate_up_proj innermost."""
    targeted = {name.rpartition(".")[2] for name in config.get("target_parameters") or []} & set(PROJECTIONS)
    if targeted >= set(PROJECTIONS):
        if module.endswith(".base_layer"):
            return f"{module.removesuffix('.base_layer')}.gate_up_proj"
        return f"{module}.down_proj"
    return f"{module}.{targeted.pop() if targeted else 'gate_up_proj'}"


def rank_and_scale(config: dict[str, Any], key: str) -> tuple[int, float]:
    """Rank and scale of the module or parameter `key`, rank and alpha patterns and rsLoRA included."""
    full = f"{key}.weight" if _by_parameter(config, key) else key
    rank = _by_pattern(config.get("rank_pattern"), full, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), full, config["lora_alpha"])
    return int(rank), alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """As PEFT looks a pattern up: the first that is the whole name, or its end behind a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _by_parameter(config: dict[str, Any], key: str) -> bool:
    """Whether the module is targeted by the name of its weight, as routers are."""
    return f"{key}.weight".endswith(tuple(config.get("target_parameters") or ()))


def _read_config(directory: Path) -> dict[str, Any]:
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            hint = ""
            if (directory / "adapter_model.bin").exists():
                hint = "; pickle adapters (adapter_model.bin) are refused"
            if (directory / COMPACT_WEIGHTS).exists():
                hint = "; this one is in the compact form: `studio convert ADAPTER OUT --to peft` first"
            raise AdapterFileError(f"{directory} has no {name}: expected a PEFT adapter directory{hint}")
    check_links(directory, AdapterFileError)
    sidecar = read_sidecar(directory)
    if sidecar is not None and sidecar.format != "peft":
        raise AdapterFileError(
            f"{directory} is an adapter in the form {sidecar.format!r}, for {' and '.join(sidecar.made_for)} alone; "
            "give the standard adapter that it was exported from"
        )
    config = read_json_object(directory / CONFIG, AdapterFileError)
    if config.get("peft_type") != "LORA":
        raise AdapterFileError(
            f"{directory}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be merged"
        )
    if missing := [name for name in ("r", "lora_alpha") if name not in config]:
        raise AdapterFileError(f"{directory / CONFIG} does not say {' and '.join(missing)}")
    if wrong := list(wrong_values(config)):
        raise AdapterFileError(listed(f"{directory / CONFIG} cannot be used", wrong))
    unsupported = [name for name in NOT_MERGED if config.get(name)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in ("gaussian", "orthogonal"):
        unsupported.append(f"init_lora_weights {start!r}, which changes the base,")
    if unsupported:
        raise AdapterFileError(f"{directory}: adapters with {', '.join(unsupported)} cannot be merged here")
    return config
