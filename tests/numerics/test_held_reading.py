"""The audit reads a quantised base by itself: the same bits as the merge, and it sees what the merge gets wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters import four_bit
from adapters.export import EXPORTERS, Options, Source
from adapters.held import HeldBase
from adapters.merged import MergedWeights
from adapters.verify.held_reading import HeldReading
from adapters.verify.weights import FileReader, audit
from tests.numerics.conftest import EACH, MULTIMODAL, OTHER, Tiny, save
from tests.numerics.test_combine import trained
from tests.numerics.test_merge_into import HELD


@pytest.mark.parametrize("held", HELD.values(), ids=HELD.keys())
@pytest.mark.parametrize("tiny", [*OTHER[:4], EACH[6]], ids=str)
def test_it_is_what_the_merge_reads(tiny: Tiny, held: dict[str, Any], tmp_path: Path) -> None:
    compare(tiny, held, tmp_path)


@pytest.mark.parametrize("tiny", [*EACH, *MULTIMODAL], ids=str)
def test_it_is_what_the_merge_reads_in_every_family(tiny: Tiny, tmp_path: Path) -> None:
    compare(tiny, HELD["nf4"], tmp_path)


def compare(tiny: Tiny, held: dict[str, Any], tmp_path: Path) -> None:
    base = save(tiny, tmp_path)
    merged, read = MergedWeights(base, None, held), HeldReading(base, held)
    assert any(merged.computed(key) for key in merged.index)
    for key, info in merged.index.items():
        for expert in range(info.shape[0]) if len(info.shape) == 3 else [None]:
            assert torch.equal(read(key, expert), merged.weight(key, expert)), (key, expert)


def scaled(restored: Tensor) -> Tensor:
    restored[..., :1] *= 1.1
    return restored


def turned(packed: Tensor, absmax: Tensor, kind: str, out: Tensor) -> None:
    DEQUANTIZE((packed >> 4) | (packed << 4), absmax, kind, out)


DEQUANTIZE, RESTORE, READ = four_bit.dequantize, four_bit.restore, HeldBase._dequantized
FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "one scale": (four_bit, "restore", lambda *given: scaled(RESTORE(*given))),
    "halves of a byte": (four_bit, "dequantize", turned),
    "another code table": (four_bit, "dequantize", lambda p, a, kind, out: DEQUANTIZE(p, a, "fp4", out)),
    "one value": (HeldBase, "_dequantized", lambda *given: plus_one(READ(*given))),
    "not quantised": (HeldBase, "covers", lambda *given: False),
}


def plus_one(matrix: Tensor) -> Tensor:
    matrix[3, 5] += 0.5 * matrix.abs().max()
    return matrix


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_merges_dequantisation_is_caught(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = Tiny("qwen3_moe", 64, 64)
    base = save(tiny, tmp_path)
    source = Source(base, trained(base, tiny, tmp_path / "adapter", 1), "tiny", HELD["nf4"])
    assert statuses(source, tmp_path / "right") == {"passed"}
    monkeypatch.setattr(*FAULTS[fault])
    assert "failed" in statuses(source, tmp_path / "wrong")


def statuses(source: Source, out: Path) -> set[str]:
    out.mkdir()
    EXPORTERS["safetensors"].write(source, out, Options(dtype="float32"))
    return {check.status for check in audit(source, FileReader(out), dtype="float32")}
