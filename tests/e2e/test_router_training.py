"""The recipe's section `router` through TRL's trainer: losses, rows, rules; and two real jobs, one that collapses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoTokenizer

from adapters.layouts import layout_for
from adapters.loading import load_base
from adapters.lora import attach
from adapters.placement import Placement
from adapters.routed import use_routed_experts
from adapters.router_losses import routing_kl
from adapters.routing import watch_routing
from studio import open_job
from studio.data import Example, Message
from studio.encoding import encode
from studio.errors import TargetError, TrainingError
from studio.jobs import Job
from studio.placing import plan_placement
from studio.plan import recipe_base
from studio.recipe import parse_recipe
from studio.recipe_model import RouterSettings
from studio.trainers.router import PROBE_TOKENS, RouterWatch, probe_batches, watch_router
from studio.trainers.sft import train
from tests.e2e.conftest import TICKETS, build_base, studio, write_recipe
from tests.e2e.runs import Recorder
from tests.numerics.conftest import Tiny, randomise

EXPERTS, TOP_K, LAYERS = 4, 2, [0, 1]
SAME = {"epochs": None, "max_steps": 3, "batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1}


class Run:
    """One training in this process, on a tiny Qwen 3 MoE."""

    def __init__(self, base: Path, examples: list[Example], folder: Path, **sections: dict[str, Any]):
        recipe = {
            "model": {"base": str(base), "quantization": "none"},
            "data": {"train": str(TICKETS / "tickets-train.jsonl")},
            "adapter": {"attention_rank": 4, "shared_expert_rank": 0, "routed_experts_rank": 0},
            "output": {"dir": str(folder / "job")},
        } | sections
        recipe["training"] = {**SAME, **sections.get("training", {})}
        self.recipe = parse_recipe(yaml.safe_dump(recipe))
        self.job, self.examples = Recorder(folder), examples
        torch.manual_seed(0)
        model = load_base(base, quantize="none", dtype=torch.float32)
        self.model = attach(model, plan_placement(self.recipe, recipe_base(self.recipe)))
        self.tokenizer = AutoTokenizer.from_pretrained(base)

    def train(self) -> Run:
        train(self.model, self.tokenizer, self.recipe, self.examples, cast(Job, self.job))
        return self

    def adapter(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def routing(self, examples: list[Example]) -> list[dict[int, tuple[Tensor, Tensor]]]:
        """(logits, experts) by layer of each example, one at a time, so without padding."""
        found = []
        self.model.eval()
        for example in examples:
            ids = torch.tensor([encode(self.tokenizer, example, 256)[0]])
            with watch_routing(self.model, layout_for("qwen3_moe")) as seen, torch.no_grad():
                self.model(input_ids=ids)
            found.append({r.layer: (r.logits, r.experts) for r in seen})
        return found


def example(text: str, answer: str = "yes") -> Example:
    return Example((Message("user", text),), (Message("assistant", answer),))


EXAMPLES = [example(f"ticket {'about a broken lamp ' * n}", "house " * n) for n in range(1, 5)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base("qwen3_moe", tmp_path_factory.mktemp("router") / "base")


def test_the_rows_equal_a_recount_example_by_example(base: Path, tmp_path: Path) -> None:
    run = Run(base, EXAMPLES, tmp_path, router={"mode": "lora", "rank": 2, "z_loss_coef": 1e-3})
    before = run.routing(EXAMPLES)
    rows = run.train().job.of("router")
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["layers"] == LAYERS for row in rows)
    tokens = sum(len(example[0][0]) for example in before)
    assert rows[0]["tokens"] == tokens  # every example is in the batch, and the longest pads the others
    for number, layer in enumerate(LAYERS):
        chosen = torch.cat([example[layer][1] for example in before]).flatten().tolist()
        counts = [chosen.count(expert) for expert in range(EXPERTS)]
        entropy = -sum(c / len(chosen) * math.log(c / len(chosen)) for c in counts if c) / math.log(EXPERTS)
        assert rows[0]["load_entropy"][number] == pytest.approx(entropy, abs=1e-5)
        assert rows[0]["busiest"][number] == pytest.approx(max(counts) / tokens, abs=1e-5)
        assert rows[0]["dead"][number] == counts.count(0)
    squares = [example[layer][0].exp().sum(1).log() ** 2 for example in before for layer in LAYERS]
    assert rows[0]["z_loss"] == pytest.approx(torch.cat(squares).mean().item(), rel=1e-3)
    assert rows[0]["kl"] == [0, 0]  # the warm-up's first step has a learning rate of 0


def test_the_drift_is_the_kl_of_the_tuned_models_routing_from_the_bases(base: Path, tmp_path: Path) -> None:
    """The router is frozen: what drifts is what it is given."""
    run = Run(base, EXAMPLES, tmp_path, router={"probe_examples": 3}, training={"learning_rate": 0.02})
    before, rows = run.routing(EXAMPLES[:3]), run.train().job.of("router")
    after = run.routing(EXAMPLES[:3])
    for number, layer in enumerate(LAYERS):
        values = []
        for old, new in zip(before, after, strict=True):
            p, q = old[layer][0].softmax(-1), new[layer][0].softmax(-1)
            values += (p * (p / q).log()).sum(-1).tolist()
        assert rows[-1]["kl"][number] == pytest.approx(sum(values) / len(values), rel=1e-3, abs=2e-6)
        assert rows[-1]["kl"][number] > 1e-4


def test_the_base_is_the_model_without_its_adapter_also_where_training_goes_on(base: Path, tmp_path: Path) -> None:
    run = Run(base, EXAMPLES, tmp_path, training={"max_steps": 1})
    randomise(run.model)
    with run.model.disable_adapter():
        before = run.routing(EXAMPLES)
    drift = run.train().job.of("router")[0]["kl"]  # the one step has a learning rate of 0
    for found, layer in zip(drift, LAYERS, strict=True):
        pairs = zip(before, run.routing(EXAMPLES), strict=True)
        values = torch.cat([routing_kl(old[layer][0], new[layer][0], "softmax") for old, new in pairs])
        assert found == pytest.approx(values.mean().item(), rel=1e-3) and found > 1e-3


def test_the_probe_draws_no_random_number(tmp_path: Path) -> None:
    """Phi-MoE's routers do while training."""
    tiny = Tiny("phimoe", 64, 32)
    model = attach(use_routed_experts(tiny.build()), Placement(attention=2)).train()
    probe = probe_batches([[5, 6, 7], [8, 9]], 0, torch.device("cpu"))
    job = Recorder(tmp_path)
    watch = RouterWatch(model, tiny.layout, RouterSettings(), {}, probe, cast(Job, job))
    state = torch.get_rng_state()
    watch.on_train_begin(*[cast(Any, None)] * 3)
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in model.modules())
    assert [logits.shape for logits in watch.base[0]] == [(5, 6)] * 2


def test_watching_changes_no_bit_of_the_training(base: Path, tmp_path: Path) -> None:
    watched, alone = (Run(base, EXAMPLES, tmp_path, router={"watch": on}).train() for on in (True, False))
    assert not alone.job.of("router") and watched.job.of("router")
    for (name, mine), other in zip(watched.adapter().items(), alone.adapter().values(), strict=True):
        assert torch.equal(mine, other), name
    assert [r["loss"] for r in watched.job.of("train")] == [r["loss"] for r in alone.job.of("train")]


LOSSES = {"load_balance_coef": 0.5, "z_loss_coef": 0.01, "distill_coef": 0.5}


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_accumulation_and_checkpointing_give_the_same_training(base: Path, tmp_path: Path, mode: str) -> None:
    """On one example over and over, so that each part of a batch has the whole batch's losses."""
    ways = ({}, {"batch_size": 2, "gradient_accumulation_steps": 2}, {"gradient_checkpointing": True})
    rank = {"rank": 2} if mode == "lora" else {}
    router = {"mode": mode, **rank, **LOSSES}
    runs = [Run(base, EXAMPLES[2:3] * 12, tmp_path, router=router, training=way).train() for way in ways]
    assert len(runs[0].adapter()) == len(runs[1].adapter()) == len(runs[2].adapter())
    for other in runs[1:]:
        for mine, row in zip(runs[0].job.of("train"), other.job.of("train"), strict=True):
            assert row["loss"] == pytest.approx(mine["loss"], rel=1e-4)
            assert row["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-3)
        for mine, row in zip(runs[0].job.of("router"), other.job.of("router"), strict=True):
            assert row["tokens"] == mine["tokens"]
            for name in ("load_balance_loss", "z_loss", "distill_loss"):
                assert row[name] == pytest.approx(mine[name], rel=1e-3, abs=2e-5)


def test_the_losses_do_what_they_are_for(base: Path, tmp_path: Path) -> None:
    def last(**coefs: float) -> dict[str, Any]:
        training = {"max_steps": 12, "learning_rate": 0.02}
        run = Run(base, EXAMPLES, tmp_path, router={"mode": "full", **coefs}, training=training).train()
        return cast(dict[str, Any], run.job.of("router")[-1])

    plain, balanced, held = last(), last(load_balance_coef=5.0), last(distill_coef=20.0)
    assert min(balanced["load_entropy"]) > min(plain["load_entropy"]) + 0.1
    assert max(held["kl"]) < max(plain["kl"])


@pytest.mark.parametrize("section", [{}, {"router": {"mode": "full", "z_loss_coef": 0.1}}], ids=["watched", "loss"])
def test_losses_without_a_gradient_are_refused(
    base: Path, tmp_path: Path, section: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    training, trl = {"gradient_checkpointing": True}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    run = Run(base, EXAMPLES, tmp_path, training=training, trl=trl, **section)
    if not section:
        assert run.train().job.of("router")[0]["tokens"]
        return
    with pytest.raises(TrainingError, match="use_reentrant"):
        run.train()


def test_a_warning_is_written_once_until_the_value_is_back(base: Path, tmp_path: Path) -> None:
    training = {"max_steps": 5, "learning_rate": 0.02}
    run = Run(base, EXAMPLES, tmp_path, router={"warn_kl": 1e-3, "warn_busiest": 1.0}, training=training).train()
    over = [row["step"] for row in run.job.of("router") if max(row["kl"]) > 1e-3]
    assert len(over) > 1
    (warning,) = run.job.of("warning")
    assert warning["step"] == over[0] and "router.warn_kl (0.001)" in warning["message"]


@pytest.mark.parametrize("steps", [7, 6])
def test_the_steps_after_the_last_log_have_a_row_too(base: Path, tmp_path: Path, steps: int) -> None:
    run = Run(base, EXAMPLES, tmp_path, training={"max_steps": steps, "logging_steps": 3}).train()
    rows = run.job.of("router")
    assert [row["step"] for row in rows] == ([1, 3, 6, 7] if steps == 7 else [1, 3, 6])
    assert sum(row["tokens"] for row in rows) == steps * rows[0]["tokens"]  # every batch holds every example


def test_a_limit_that_is_passed_after_the_last_log_stops_the_job(base: Path, tmp_path: Path) -> None:
    """The first row is of the base's routing: the warm-up's first step has a learning rate of 0."""
    training = {"max_steps": 4, "logging_steps": 10, "learning_rate": 0.02}
    run = Run(base, EXAMPLES, tmp_path, router={"stop_kl": 1e-4}, training=training)
    with pytest.raises(TrainingError, match=r"at step 4, layer .* router\.stop_kl"):
        run.train()
    assert [row["step"] for row in run.job.of("router")] == [1, 4]


def watch_of(tmp_path: Path, **router: float) -> tuple[RouterWatch, Recorder]:
    """A watch for its rules alone."""
    job, none = Recorder(tmp_path), cast(Any, None)
    return RouterWatch(none, none, RouterSettings.model_validate(router), {}, [], cast(Job, job)), job


def router_row(step: int, **values: list[float]) -> dict[str, Any]:
    return {
        "step": step,
        "layers": [1, 3, 5],
        "kl": [0.0] * 3,
        "load_entropy": [1.0] * 3,
        "busiest": [0.1] * 3,
    } | values


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(("values", "worst"), [([0.0, NAN, 9.0], 3), ([NAN, NAN, NAN], 1), ([0.0, INFINITY, 0.0], 3)])
@pytest.mark.parametrize(("rule", "key"), [("kl", "kl"), ("entropy", "load_entropy"), ("busiest", "busiest")])
def test_a_value_that_is_not_finite_is_past_every_limit(
    tmp_path: Path, rule: str, key: str, values: list[float], worst: int
) -> None:
    row = router_row(4, **{key: values})
    watch, job = watch_of(tmp_path, **{f"warn_{rule}": 0.5})
    watch._apply_rules(row)
    (warning,) = job.of("warning")
    assert f"layer {worst}: " in warning["message"] and f"router.warn_{rule} (0.5)" in warning["message"]
    with pytest.raises(TrainingError, match=rf"layer {worst}: .* router\.stop_{rule} \(0\.5\)"):
        watch_of(tmp_path, **{f"stop_{rule}": 0.5})[0]._apply_rules(row)
    watch, job = watch_of(tmp_path)
    watch._apply_rules(row)  # no rule: no limit
    assert not job.rows


def test_each_layer_is_warned_of_when_it_goes_over(tmp_path: Path) -> None:
    watch, job = watch_of(tmp_path, warn_kl=0.1, warn_entropy=0.5)
    steps = ([0.0, 0.2, 0.0], [0.3, 0.2, 0.0], [0.3, 0.0, 0.1], [0.2, 0.3, 0.4])
    for step, drift in enumerate(steps, 1):
        watch._apply_rules(router_row(step, kl=drift))
    said = [(row["step"], row["message"].split(", above")[0]) for row in job.of("warning")]
    moved = "the routing of the probe set is {} nats (KL) from the base's"
    assert said == [
        (1, f"at step 1, layer 3: {moved.format(0.2)}"),
        (2, f"at step 2, layer 1: {moved.format(0.3)}"),
        (4, f"at step 4, layer 5: {moved.format(0.4)}"),
    ]
    assert job.of("warning")[0]["message"].endswith("above router.warn_kl (0.1)")
    assert job.of("warning")[2]["message"].endswith("router.warn_kl (0.1), and so is layer 3")


def test_a_rule_that_could_never_fire_fails_the_plan(base: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"model": {"base": str(base)}, "adapter": {"shared_expert_rank": 0}}
    recipe = write_recipe(tmp_path / "recipe.yaml", **sections, router={"stop_entropy": 0.5})
    run = studio("plan", recipe, "--json")
    said = " ".join((run.stdout + run.stderr).split())
    assert run.returncode == 1 and "router.stop_entropy is 0.5, which is never reached" in said  # log 2 / log 4
    assert "each token goes to 2 of 4 experts" in said and "allowed: above 0.5" in said


def test_a_dense_model_is_not_watched_and_what_asks_for_its_routing_is_refused(tmp_path: Path) -> None:
    model = attach(Tiny("llama", 64, 96).build(), Placement(attention=2))

    def watch(**router: float) -> RouterWatch | None:
        data = {"train": str(TICKETS / "tickets-train.jsonl")}
        recipe = parse_recipe(yaml.safe_dump({"data": data, "router": router, "output": {"dir": str(tmp_path)}}))
        return watch_router(model, cast(Any, None), recipe, EXAMPLES, cast(Job, Recorder(tmp_path)))

    assert watch() is None
    with pytest.raises(TargetError, match=r"router\.warn_kl, router\.stop_busiest is set, but this llama model has no"):
        watch(warn_kl=0.1, stop_busiest=0.9)


def test_the_probe_set_is_cut_to_its_tokens_and_batched_by_length() -> None:
    rows = [[7] * length for length in (900, 3, 1000, 5, 400, 10)]
    batches = probe_batches(rows, 0, torch.device("cpu"))
    assert sum(int(mask.sum()) for _, mask in batches) == PROBE_TOKENS
    assert sorted(int(n) for _, mask in batches for n in mask.sum(1)) == [3, 5, 140, 900, 1000]
    for ids, mask in batches:
        assert ids.numel() <= PROBE_TOKENS and torch.equal(ids != 0, mask.bool())


def test_a_router_that_collapses_stops_the_job_and_another_is_warned_of(base: Path, tmp_path: Path) -> None:
    """A learning rate of 0.5 on a whole router sends every token of a layer to one expert within a few steps."""
    adapter = {"attention_rank": 0, "shared_expert_rank": 0, "routed_experts_rank": 0}
    sections: dict[str, Any] = {"model": {"base": str(base)}, "adapter": adapter, "data": {"eval": None}}
    collapse = {"max_steps": 50, "learning_rate": 0.5}
    router = {"mode": "full", "stop_busiest": 0.95, "warn_kl": 0.05}
    recipe = write_recipe(tmp_path / "recipe.yaml", **sections, training=collapse, router=router)
    run = studio("run", recipe, "--json")
    answer, job = json.loads(run.stdout), open_job(tmp_path / "job")
    assert run.returncode == 1 and answer["status"] == "failed"
    assert answer["error"]["type"] == "TrainingError"
    rows = [row for row in job.metrics() if row["kind"] == "router"]
    said, share = answer["error"]["message"], max(rows[-1]["busiest"])
    assert (
        f"at step {rows[-1]['step']}, layer {LAYERS[rows[-1]['busiest'].index(share)]}: the busiest expert got" in said
    )
    assert f"{share:.3g} of the tokens, above router.stop_busiest (0.95)" in said
    assert max(rows[-1]["busiest"]) > 0.95 and len(rows) < 50
    assert all(max(row["busiest"]) <= 0.95 for row in rows[:-1])
    assert any(row["kind"] == "warning" and "router.warn_kl" in row["message"] for row in job.metrics())
    assert not (job.path / "adapter").exists()


def test_a_job_whose_router_is_trained_fully_merges_into_another_router(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    adapter = {"attention_rank": 0, "shared_expert_rank": 0, "routed_experts_rank": 0}
    router = {"mode": "full", "distill_coef": 0.1, "warn_entropy": 1.0}
    sections: dict[str, Any] = {"model": {"base": str(base)}, "adapter": adapter, "data": {"eval": None}}
    recipe = write_recipe(tmp_path / "recipe.yaml", **sections, training={"max_steps": 3}, router=router)
    assert (run := studio("run", recipe, "--json")).returncode == 0, run.stdout + run.stderr
    metrics = open_job(tmp_path / "job").metrics()
    assert [row["step"] for row in metrics if row["kind"] == "router"] == [1, 2, 3]
    assert any(row["kind"] == "warning" and "warn_entropy" in row["message"] for row in metrics)
    merge = studio("merge", tmp_path / "job", "--out", tmp_path / "merged", "--dtype", "float32")
    assert merge.returncode == 0, merge.stdout + merge.stderr
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name].float(), after[name])}
    assert changed == {f"model.layers.{layer}.mlp.gate.weight" for layer in LAYERS}
