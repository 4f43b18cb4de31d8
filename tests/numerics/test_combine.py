"""Combined adapters against dense loops in float64, and against PEFT's own `add_weighted_adapter` where it has them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from adapters.adapter_files import CONFIG, WEIGHTS, AdapterFile
from adapters.combine import RECORD, Settings, combine, compressed, dare, factored, seed_of, ties
from adapters.errors import AdapterFileError, OutputExistsError
from adapters.lora import attach
from adapters.merge import merge_adapter
from adapters.merged import MergedWeights
from adapters.peft_files import save_adapter
from adapters.placement import Placement
from adapters.sidecar import read_sidecar
from studio.cli import app
from tests.numerics.conftest import EACH, Tiny, load_plain, randomise, save
from tests.numerics.test_expert_lora import UNEVEN
from tests.numerics.test_families import placement, stock_model

OTHER_RANKS = ((0, 3, 1, 0, 0, 2), (2, 0, 0, 4, 0, 1))
LIMIT = 2e-6
"""Of the largest value of a delta: factors are float32."""


def trained(base: Path, tiny: Tiny, out: Path, seed: int, placed: Placement | None = None) -> Path:
    placed = placed or placement(tiny)
    model = attach(load_plain(base), placed)
    randomise(model, seed, std=0.1)
    save_adapter(model, placed, out, base_name="base", base=base, held={"dtype": "float32"})
    return out


def dense(base: Path, adapter: Path) -> dict[str, Tensor]:
    """Every delta in float64, (E, out, in) or (1, out, in), by the slow obvious loop."""
    read: AdapterFile | None = MergedWeights(base, adapter).adapter
    assert read is not None
    found = {name: (one.scale * one.B.double() @ one.A.double())[None] for name, one in read.linear.items()}
    for name, stack in read.experts.items():
        found[name] = torch.stack(
            [stack.scale * b.double() @ a.double() for a, b in zip(stack.A, stack.B, strict=True)]
        )
    return found


def weighted(deltas: list[dict[str, Tensor]], weights: tuple[float, ...], name: str) -> list[Tensor]:
    like = next(found[name] for found in deltas if name in found)
    return [weight * found.get(name, torch.zeros_like(like)) for found, weight in zip(deltas, weights, strict=True)]


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], limit: float = LIMIT) -> None:
    for name in found.keys() | wanted.keys():
        if name not in found or name not in wanted:
            assert not (found | wanted)[name].any(), name  # the partner projection that PEFT's file needs
            continue
        scale = wanted[name].abs().max().clamp(min=1e-12)
        assert (found[name] - wanted[name]).abs().max() / scale < limit, name


@pytest.fixture
def pair(square: Tiny, tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base, and two adapters with experts of their own and classes that only one of them has."""
    base = save(square, tmp_path)
    shared = 4 if square.layout.shared_expert else 0
    first = Placement(attention=8, shared_expert=shared, routed=UNEVEN, alpha=12.0)
    second = Placement(attention=3, router=2, routed=OTHER_RANKS, alpha=5.0)
    return base, [trained(base, square, tmp_path / "one", 1, first), trained(base, square, tmp_path / "two", 2, second)]


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5)], ids=["weighted", "a task taken away"])
def test_a_sum_is_exact_for_every_expert(pair: Any, tmp_path: Path, weights: tuple[float, ...]) -> None:
    base, adapters = pair
    report = combine(base, adapters, tmp_path / "out", Settings("sum", weights), base_name="base")
    deltas = [dense(base, adapter) for adapter in adapters]
    names = deltas[0].keys() | deltas[1].keys()
    close(dense(base, tmp_path / "out"), {name: sum(weighted(deltas, weights, name)) for name in names})  # type: ignore[misc]
    assert report["rank"] == 11 and report["lost"] == {"largest": 0.0, "mean": 0.0} and report["warnings"] == []
    read = MergedWeights(base, tmp_path / "out").adapter
    assert read is not None
    together = max(a + b for one, two in zip(UNEVEN, OTHER_RANKS, strict=True) for a, b in zip(one, two, strict=True))
    assert {stack.A.shape[1] for stack in read.experts.values()} == {together}, "no rank for what no expert needs"


@pytest.mark.parametrize("tiny", EACH, ids=str)
def test_a_sum_in_stock_peft_is_the_sum_of_what_stock_peft_merges(tiny: Tiny, tmp_path: Path) -> None:
    base = save(tiny, tmp_path)
    adapters = [trained(base, tiny, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    combine(base, adapters, tmp_path / "out", Settings("sum", (0.6, -0.4)), base_name="base")

    def merged(adapter: Path) -> dict[str, Tensor]:
        return dict(PeftModel.from_pretrained(stock_model(base), str(adapter)).merge_and_unload().named_parameters())

    plain = dict(stock_model(base).named_parameters())
    one, two, out = (merged(adapter) for adapter in (*adapters, tmp_path / "out"))
    for name, value in plain.items():
        wanted = value + 0.6 * (one[name] - value) - 0.4 * (two[name] - value)
        torch.testing.assert_close(out[name], wanted, rtol=0, atol=2e-6, msg=name)
    assert any((out[name] - value).abs().max() > 1e-2 for name, value in plain.items() if value.ndim == 3) or not (
        tiny.layout.has_experts
    )
    merge_adapter(base, tmp_path / "out", tmp_path / "model")
    ours = dict(stock_model(tmp_path / "model").named_parameters())
    for name, value in out.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-6, msg=name)


def test_a_rank_gives_the_nearest_matrix_of_that_rank(pair: Any, tmp_path: Path) -> None:
    base, adapters = pair
    report = combine(base, adapters, tmp_path / "out", Settings("sum", (1.0, 1.0), rank=2), base_name="base")
    deltas = [dense(base, adapter) for adapter in adapters]
    wanted, lost = {}, []
    for name in deltas[0].keys() | deltas[1].keys():
        total = torch.stack(weighted(deltas, (1.0, 1.0), name)).sum(0)
        u, s, v = torch.linalg.svd(total, full_matrices=False)
        wanted[name] = (u[:, :, :2] * s[:, None, :2]) @ v[:, :2]
        lost += [
            float((rest.square().sum() / whole.square().sum()).sqrt())
            for rest, whole in zip(s[:, 2:], s, strict=True)
            if whole.any()
        ]
    close(dense(base, tmp_path / "out"), wanted, 2e-5)
    assert report["rank"] == 2 and report["lost"]["largest"] == pytest.approx(max(lost), abs=1e-4)
    assert report["lost"]["mean"] == pytest.approx(sum(lost) / len(lost), abs=1e-4)
    assert any("larger --rank" in line for line in report["warnings"])


def slow_ties(deltas: list[Tensor], density: float) -> Tensor:
    """Value by value, as the paper says it: trim, elect, disjoint mean."""
    out = torch.zeros_like(deltas[0])
    trimmed = []
    for delta in deltas:
        order = sorted(delta.flatten().abs().tolist(), reverse=True)
        least = order[int(density * delta.numel()) - 1]
        trimmed.append(torch.where(delta.abs() >= least, delta, torch.zeros_like(delta)))
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            values = [float(delta[row, column]) for delta in trimmed]
            sign = 1 if sum(values) > 0 else -1
            agreeing = [value for value in values if value * sign > 0]
            out[row, column] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out


def test_ties_of_every_expert_is_the_slow_one(pair: Any, tmp_path: Path) -> None:
    base, adapters = pair
    weights, full = (1.0, -0.5), 64
    settings = Settings("ties", weights, rank=full, density=0.25)
    report = combine(base, adapters, tmp_path / "out", settings, base_name="base")
    deltas = [dense(base, adapter) for adapter in adapters]
    found, compared = dense(base, tmp_path / "out"), 0
    for name in ("self_attn.k_proj.weight", "experts.gate_up_proj", "experts.down_proj"):
        name = next(one for one in found if one.endswith(name))
        for expert in range(min(2, len(found[name]))):
            each = [delta[expert].float() for delta in weighted(deltas, weights, name)]
            wanted = slow_ties(each, 0.25)
            assert (found[name][expert] - wanted).abs().max() / wanted.abs().max() < 2e-4
            compared += bool(wanted.any())
    assert compared > 3 and report["lost"]["largest"] < 1e-2


def test_dare_keeps_a_fraction_rescaled_and_the_same_in_every_run(pair: Any, tmp_path: Path) -> None:
    base, adapters = pair
    weights, settings = (1.0, 0.5), Settings("dare", (1.0, 0.5), rank=64, density=0.4, seed=3)
    combine(base, adapters, tmp_path / "out", settings, base_name="base")
    combine(base, adapters, tmp_path / "again", settings, base_name="base")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()
    deltas, found = [dense(base, adapter) for adapter in adapters], dense(base, tmp_path / "out")
    for name in [one for one in found if one.endswith(("q_proj.weight", "down_proj"))]:
        for expert in range(len(found[name])):
            wanted = torch.zeros_like(found[name][expert])
            for number, delta in enumerate(weighted(deltas, weights, name)):
                source = torch.Generator().manual_seed(seed_of(3, number, name, expert))
                kept = torch.rand(delta[expert].shape, generator=source) < 0.4
                wanted += torch.where(kept, delta[expert] / 0.4, 0.0)
            assert (found[name][expert] - wanted).abs().max() <= 2e-4 * wanted.abs().max()
    other = Settings("dare", (1.0, 0.5), rank=64, density=0.4, seed=4)
    combine(base, adapters, tmp_path / "other", other, base_name="base")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() != (tmp_path / "other" / WEIGHTS).read_bytes()


def test_dares_values_are_kept_in_proportion_and_right_on_average() -> None:
    torch.manual_seed(0)
    delta = torch.randn(1, 300, 200)
    found = torch.stack([dare(delta, 0.3, [seed_of(0, run)]) for run in range(200)])
    assert (found != 0).float().mean() == pytest.approx(0.3, abs=2e-3)
    assert (found.mean(0) - delta[0]).abs().mean() < 0.12 and (found.sum(0) / 200 - delta[0]).mean().abs() < 1e-2


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("cat", Settings("sum", (0.7, -0.3))),
        ("svd", Settings("sum", (0.7, 0.3), rank=3)),
        ("ties_svd", Settings("ties", (0.5, 0.5), rank=4, density=0.5)),
    ],
)
def test_pefts_own_combination_of_two_linear_loras_is_the_same(kind: str, settings: Settings, tmp_path: Path) -> None:
    """PEFT refuses this for `target_parameters`; on linear modules it is an independent reference."""
    base = save(Tiny("llama", 64, 32), tmp_path)
    config = {"lora_alpha": 7, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    stock = get_peft_model(stock_model(base), LoraConfig(r=3, **config), adapter_name="one")
    stock.add_adapter("two", LoraConfig(r=4, **config))
    torch.manual_seed(1)
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    stock.save_pretrained(tmp_path)
    rank, density = settings.rank, settings.density if settings.method == "ties" else None
    stock.add_weighted_adapter(["one", "two"], list(settings.weights), "both", kind, svd_rank=rank, density=density)
    combine(base, [tmp_path / "one", tmp_path / "two"], tmp_path / "out", settings, base_name="base")
    found = dense(base, tmp_path / "out")
    assert len(found) == 6
    for name, delta in found.items():
        wanted = stock.get_submodule(f"base_model.model.{name.removesuffix('.weight')}").get_delta_weight("both")
        torch.testing.assert_close(delta[0].float(), wanted, rtol=0, atol=2e-6)


def test_large_deltas_are_factored_by_the_randomised_algorithm_as_well_as_exactly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    delta = torch.randn(90, 8) @ torch.randn(8, 70) + 0.01 * torch.randn(90, 70)
    a, b, lost = factored(delta, 8, seed=1)
    monkeypatch.setattr("adapters.combine.LARGE", 1)
    random_a, random_b, random_lost = factored(delta, 8, seed=1)
    torch.testing.assert_close(random_b @ random_a, b @ a, rtol=0, atol=1e-3)
    assert random_lost == pytest.approx(lost, rel=2e-2) and 0 < lost < 0.05


def test_small_pieces() -> None:
    deltas = torch.tensor([[[3.0, -2.0, 1.0]], [[1.0, 2.5, -1.0]]])
    assert ties(deltas, 1.0).tolist() == [[2.0, 2.5, 0.0]], "the mean of those that agree; a tie gives none"
    assert ties(deltas, 0.34).tolist() == [[3.0, 2.5, 0.0]], "only the largest value of each is left"
    a, b = torch.randn(5, 9), torch.randn(7, 5)
    low_a, low_b, lost = compressed(a, b, 5)
    torch.testing.assert_close(low_b @ low_a, b @ a)
    assert lost < 1e-6 and low_a.shape == (5, 9)
    assert torch.equal(dare(torch.ones(1, 2, 2), 1.0, [0]), torch.ones(2, 2))


def test_the_result_says_what_it_is_made_of(pair: Any, tmp_path: Path) -> None:
    base, adapters = pair
    combine(base, adapters, tmp_path / "out", Settings("sum", (0.7, 0.3)), base_name="the base")
    sidecar, first = read_sidecar(tmp_path / "out"), read_sidecar(adapters[0])
    assert sidecar is not None and first is not None
    assert (sidecar.base, sidecar.held, sidecar.base_name) == (first.base, {"dtype": "float32"}, "the base")
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["method"] == "sum" and record["weights"] == [0.7, 0.3] and str(tmp_path) not in json.dumps(record)
    hashes = [hashlib.sha256((adapter / WEIGHTS).read_bytes()).hexdigest() for adapter in adapters]
    assert [one["sha256"] for one in record["adapters"]] == hashes


def test_an_adapter_of_some_layers_alone_names_them(tmp_path: Path) -> None:
    base = save(Tiny("mixtral", 64, 32), tmp_path)
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1])
    stock = get_peft_model(stock_model(base), config)
    randomise(stock)
    stock.save_pretrained(tmp_path / "one")
    combine(base, [tmp_path / "one"], tmp_path / "out", Settings("sum", (0.5,)), base_name="base")
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    again = PeftModel.from_pretrained(stock_model(base), str(tmp_path / "out")).merge_and_unload()
    before, after = dict(stock_model(base).named_parameters()), dict(again.named_parameters())
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.1.self_attn.q_proj.weight"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings("mean", (1.0, 1.0)), "method 'mean': allowed are sum, ties, dare"),
        (Settings("sum", (1.0,)), "1 weights for 2 adapters"),
        (Settings("sum", (1.0, float("nan"))), "each is a number other than 0"),
        (Settings("sum", (1.0, 0.0)), "leave an adapter out instead"),
        (Settings("ties", (1.0, 1.0), density=0.0), "density 0.0"),
        (Settings("sum", (1.0, 1.0), rank=0), "rank 0: at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(pair: Any, tmp_path: Path, settings: Settings, said: str) -> None:
    base, adapters = pair
    with pytest.raises(AdapterFileError, match=said):
        combine(base, adapters, tmp_path / "out", settings, base_name="base")
    assert not (tmp_path / "out").exists()


def test_adapters_of_other_bases_and_outputs_in_use_are_refused(pair: Any, square: Tiny, tmp_path: Path) -> None:
    base, adapters = pair
    both = Settings("sum", (1.0, 1.0))
    (tmp_path / "other").mkdir()
    changed = save(square, tmp_path / "other")
    weights = load_file(changed / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterFileError, match="differs from it in its weights"):
        combine(changed, adapters, tmp_path / "out", both, base_name="base")
    for target in (adapters[0], adapters[0] / "inside", tmp_path):
        with pytest.raises(OutputExistsError):
            combine(base, adapters, target, both, base_name="base", overwrite=True)
    combine(base, adapters, tmp_path / "out", both, base_name="base")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        combine(base, adapters, tmp_path / "out", both, base_name="base")
    combine(base, adapters, tmp_path / "out", both, base_name="base", overwrite=True)
    broken = load_file(adapters[1] / WEIGHTS)
    name = next(iter(broken))
    save_file({**broken, name: broken[name] * float("inf")}, adapters[1] / WEIGHTS)
    with pytest.raises(AdapterFileError, match="NaN or infinity"):
        combine(base, adapters, tmp_path / "never", both, base_name="base")
    assert not (tmp_path / "never").exists() and not list(tmp_path.glob(".never*"))


def test_the_command_combines_jobs_and_adapters_and_says_what_it_lost(pair: Any, tmp_path: Path) -> None:
    base, adapters = pair
    job = tmp_path / "job"
    job.mkdir()
    adapters[0].rename(job / "adapter")

    def studio(*arguments: object) -> Result:
        return CliRunner().invoke(app, ["combine", *map(str, arguments)])

    given = (job, adapters[1], "--weight", "0.7", "--weight", "-0.3", "--base", base)
    told = studio(*given, "--out", tmp_path / "out", "--json")
    assert told.exit_code == 0, told.output
    report = json.loads(told.output)
    assert (report["method"], report["adapters"], report["rank"]) == ("sum", 2, 11)
    deltas = [dense(base, adapter) for adapter in (job / "adapter", adapters[1])]
    names = deltas[0].keys() | deltas[1].keys()
    wanted = {name: torch.stack(weighted(deltas, (0.7, -0.3), name)).sum(0) for name in names}
    close(dense(base, tmp_path / "out"), wanted)
    told = studio(*given, "--out", tmp_path / "small", "--rank", 1)
    assert told.exit_code == 0 and "rank 1" in told.output and "Left out by the rank" in told.output
    assert "warning: rank 1 leaves out up to" in told.output
    told = studio(job, adapters[1], "--out", tmp_path / "never", "--method", "mean", "--base", base)
    assert told.exit_code == 1 and "allowed are sum, ties, dare" in told.output
    told = studio(job, adapters[1], "--out", tmp_path / "never", "--density", "0.5", "--base", base)
    assert told.exit_code == 1 and "a sum keeps every value" in told.output
    assert not (tmp_path / "never").exists()
