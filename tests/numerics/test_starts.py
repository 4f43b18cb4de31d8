"""PiSSA and LoftQ: the mathematics against explicit residuals and stock PEFT; files, merges and continuing of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from adapters.checkpoint import read_index
from adapters.continuing import load_adapter, placement_of
from adapters.errors import TargetError
from adapters.layouts import PROJECTIONS
from adapters.loading import load_base
from adapters.lora import ExpertLora, attach, lora_linears
from adapters.merge import merge_adapter
from adapters.peft_files import save_adapter
from adapters.placement import Method, Placement
from adapters.quantized_linear import dense_weight
from adapters.starts import components, original_weights
from adapters.verify.reference import put_on, reading_on
from tests.numerics.conftest import EXPERTS, Tiny, load_plain, randomise, save
from tests.numerics.test_expert_lora import placement_for
from tests.numerics.test_merge_into import HELD, options

FAMILIES = [Tiny("llama4_text", 64, 64, 1), Tiny("qwen3_moe", 64, 64, 2), Tiny("deepseek_v3", 64, 64, 2)]


def placed(tiny: Tiny, start: Any, rslora: bool = False, router: int = 2) -> Placement:
    return replace(placement_for(tiny, router=router), method=Method(start=start, rslora=rslora))


def stacks(model: PeftModel) -> list[tuple[str, ExpertLora]]:
    return [(n.removeprefix("base_model.model."), m) for n, m in model.named_modules() if isinstance(m, ExpertLora)]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (900, 800)])
def test_components_are_the_best_of_their_rank(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    decaying = torch.diag(0.8 ** torch.arange(min(shape)).float())
    left, right = (torch.linalg.qr(torch.randn(side, min(shape)))[0] for side in shape)
    matrix = left @ decaying @ right.t()
    a, b = components(matrix, 6, 2.5)
    left_over = torch.linalg.matrix_norm(matrix - 2.5 * b @ a)
    assert left_over <= 1.001 * decaying.diagonal()[6:].norm() and a.shape == (6, shape[1])
    assert components(matrix[:4], 6, 1.0)[0].shape == (4, shape[1])


@pytest.mark.parametrize("tiny", FAMILIES[:2], ids=str)
def test_pissa_is_training_on_the_residual(tiny: Tiny, tmp_path: Path, ids: Tensor) -> None:
    """The paper's own way, W − B₀A₀ put into the base, beside ours, which leaves the base alone."""
    base, want = save(tiny, tmp_path), placed(tiny, "pissa")
    ours = attach(load_plain(base), want).double()
    paper = attach(load_plain(base), replace(want, method=Method())).double()
    with torch.no_grad():
        for (_, mine), (_, theirs) in zip(stacks(ours), stacks(paper), strict=True):
            for projection in PROJECTIONS:
                stack, first = getattr(theirs.get_base_layer(), projection), 0
                pairs = zip(mine.factors("default", projection), theirs.factors("default", projection), strict=True)
                for value, target in pairs:
                    target.copy_(value)
                a, b = theirs.factors("default", projection)
                for expert, rank in enumerate(theirs.ranks["default"]):
                    part = theirs.scaling["default"] * b[first : first + rank].t() @ a[first : first + rank]
                    stack[expert] -= part.t() if tiny.layout.stack_order == "in_out" else part
                    first += rank
        linears = zip(lora_linears(ours, "default"), lora_linears(paper, "default"), strict=True)
        for (path, own), (_, other) in linears:
            for side in ("lora_A", "lora_B"):
                getattr(other, side)["default"].weight.copy_(getattr(own, side)["default"].weight)
            if not path.endswith(tiny.layout.router):
                a, b = (getattr(other, side)["default"].weight for side in ("lora_A", "lora_B"))
                other.get_base_layer().weight -= other.scaling["default"] * b @ a
    results = []
    for model in (ours, paper):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        results.append([model(ids).logits, *(p for p in model.parameters() if p.requires_grad)])
    moved = (results[0][0] - load_plain(base).double()(ids).logits).abs().max()
    assert moved > 1e-3
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def test_pissa_of_linears_is_stock_pefts(tmp_path: Path, ids: Tensor) -> None:
    tiny = FAMILIES[1]
    base = save(tiny, tmp_path)
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=list(tiny.layout.attention))
    stock = get_peft_model(tiny.model_class.from_pretrained(base), config)
    ours = attach(load_plain(base), Placement(attention=4, alpha=8, method=Method(start="pissa")))
    for model in (stock, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=0, atol=5e-5)


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_pissa_begins_as_the_base(quantize: str, tmp_path: Path, ids: Tensor) -> None:
    tiny = FAMILIES[0]
    base = save(tiny, tmp_path)
    with torch.no_grad():
        want = load_base(base, quantize=quantize)(ids).logits
        model = attach(load_base(base, quantize=quantize), placed(tiny, "pissa")).eval()
        torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=2e-5)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, want)
    _, layer = stacks(model)[0]
    assert layer.factors("default", "down_proj")[1].abs().max() > 0.1
    assert not any("lora_start" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("tiny", FAMILIES[:2], ids=str)
def test_loftq_takes_the_largest_part_of_what_was_lost(tiny: Tiny, quantize: str, tmp_path: Path) -> None:
    base = save(tiny, tmp_path)
    model = attach(load_base(base, quantize=quantize), placed(tiny, "loftq"), base=base)
    original = original_weights(read_index(base), tiny.layout)
    found = []
    for path, module in lora_linears(model, "default"):
        if not path.endswith(tiny.layout.router):
            a, b = (getattr(module, side)["default"].weight for side in ("lora_A", "lora_B"))
            lost = original(f"{path.removeprefix('base_model.model.')}.weight", None)
            found.append((lost - dense_weight(module.get_base_layer()), module.scaling["default"] * b @ a))
    for path, layer in stacks(model):
        for projection in PROJECTIONS:
            a, b = layer.factors("default", projection)
            for expert, rank in enumerate(layer.ranks["default"]):
                rows = slice(sum(layer.ranks["default"][:expert]), sum(layer.ranks["default"][: expert + 1]))
                held = getattr(layer.get_base_layer(), projection).dequantize(expert)
                lost = original(f"{path}.{projection}", expert) - held
                lost = lost.t() if tiny.layout.stack_order == "in_out" else lost
                if rank:
                    found.append((lost, layer.scaling["default"] * b[rows].t() @ a[rows]))
    for lost, delta in found:
        rank = torch.linalg.matrix_rank(delta)
        tail = torch.linalg.svdvals(lost)[rank:].norm()
        assert lost.norm() > 0 and tail < lost.norm()
        torch.testing.assert_close((lost - delta).norm(), tail, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "loftq"])
@pytest.mark.parametrize("tiny", FAMILIES, ids=str)
def test_files_and_merges_give_what_training_had(
    tiny: Tiny, start: Any, rslora: bool, tmp_path: Path, ids: Tensor
) -> None:
    base, held, want = save(tiny, tmp_path), HELD["nf4"], placed(tiny, start, rslora)
    model = attach(load_base(base, **options(held)), want, base=base).eval()
    randomise(model, std=0.07)
    adapter = tmp_path / "adapter"
    save_adapter(model, want, adapter, base_name="base", base=base, held=held)
    merge_adapter(base, adapter, tmp_path / "held", held=held)
    merge_adapter(base, adapter, tmp_path / "original")
    with torch.no_grad():
        trained = model(ids).logits
        torch.testing.assert_close(load_plain(tmp_path / "held")(ids).logits, trained, rtol=0, atol=3e-4)
        stock = PeftModel.from_pretrained(tiny.model_class.from_pretrained(base), adapter)(ids).logits
        torch.testing.assert_close(load_plain(tmp_path / "original")(ids).logits, stock, rtol=0, atol=1e-4)
        reference = load_base(base, **options(held))
        put_on(reference, reading_on(adapter, base, tiny.layout, held), tiny.layout)
        torch.testing.assert_close(reference(ids).logits, trained, rtol=0, atol=3e-4)
        if start == "pissa":  # on plain weights the same adapter is the same function
            plain = attach(load_plain(base), want).eval()
            load_adapter(plain, want, adapter)
            torch.testing.assert_close(plain(ids).logits, stock, rtol=0, atol=1e-4)
        again = attach(load_base(base, **options(held)), want, base=base).eval()
        load_adapter(again, want, adapter)
        torch.testing.assert_close(again(ids).logits, trained, rtol=0, atol=1e-5)
        save_adapter(again, want, tmp_path / "again", base_name="base", base=base, held=held)
    found = placement_of(adapter, tiny.layout)
    assert replace(found, alpha=want.alpha) == want and found.alpha == pytest.approx(want.alpha)


def test_untrained_loftq_is_nearer_to_the_original_than_its_quantised_base(tmp_path: Path, ids: Tensor) -> None:
    """An untrained LoftQ adapter stands nearer to the 16-bit model than nf4 does; its file changes nothing there."""
    tiny = FAMILIES[1]
    base, want = save(tiny, tmp_path), placed(tiny, "loftq")
    routed = tuple((16,) * EXPERTS for _ in want.routed)
    want = replace(want, attention=16, routed=routed)
    model = attach(load_base(base), want, base=base).eval()
    save_adapter(model, want, tmp_path / "adapter", base_name="base", base=base, held=HELD["nf4"])
    with torch.no_grad():
        exact = load_plain(base)(ids).logits
        assert (model(ids).logits - exact).norm() < 0.8 * (load_base(base)(ids).logits - exact).norm()
        stock = PeftModel.from_pretrained(tiny.model_class.from_pretrained(base), tmp_path / "adapter")
        torch.testing.assert_close(stock(ids).logits, exact, rtol=0, atol=1e-4)


def test_loftq_is_refused_where_nothing_was_lost(tmp_path: Path) -> None:
    tiny = FAMILIES[0]
    base = save(tiny, tmp_path)
    with pytest.raises(TargetError, match="give the directory of the base"):
        attach(load_base(base), placed(tiny, "loftq"))
    with pytest.raises(TargetError, match="is not quantised, so there is nothing for loftq"):
        attach(load_plain(base), placed(tiny, "loftq"), base=base)
