"""GRPO, RLOO and rejection sampling through TRL on the routed engine: numbers against slow loops, and real jobs."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, TrainerCallback

from adapters.loading import load_base
from adapters.lora import attach
from adapters.routed import set_expert_path
from studio import job_files as files
from studio import open_job
from studio.data import Example, read_examples
from studio.encoding import prompt_ids
from studio.errors import DataError, RewardError, TrainingError
from studio.evaluation import decoder_and_head
from studio.generations import generations
from studio.jobs import Job
from studio.placing import plan_placement
from studio.plan import recipe_base, total_steps
from studio.progress import warnings
from studio.recipe import Recipe, parse_recipe
from studio.rewards import Attempt, Reward, rewards_of
from studio.rewards.scoring import each
from studio.sampling import draw
from studio.trainers import online, trainer_for
from studio.trainers.router import RouterWatch
from tests.e2e.conftest import REPOSITORY, TICKETS, build_base, studio, write_recipe
from tests.e2e.runs import Recorder

EXAMPLES = read_examples(TICKETS / "tickets-eval.jsonl")[:8]
FAMILIES = ["llama4_text", "qwen3_moe"]
EVEN = "^[a-z ]"
"""A reward that random text of these bases gets about as often as not."""


def recipe_for(base: Path | str, folder: Path, **sections: Any) -> Recipe:
    shared = 0 if "qwen3_moe" in str(base) else 4
    recipe: dict[str, Any] = {
        "model": {"base": str(base)},
        "data": {"train": str(TICKETS / "tickets-eval.jsonl")},
        "adapter": {"attention_rank": 4, "shared_expert_rank": shared, "routed_experts_rank": 4},
        "training": {"method": "grpo", "max_steps": 2, "batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1},
        "rewards": [{"function": "regex", "pattern": EVEN}],
        "sampling": {"completions": 4, "max_new_tokens": 12},
        "output": {"dir": str(folder / "job")},
    }
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section} if isinstance(section, dict) else section
    return parse_recipe(yaml.safe_dump(recipe))


class Run:
    """One training in this process."""

    def __init__(
        self, base: Path, folder: Path, examples: list[Example] = EXAMPLES, path: str = "fast", **sections: Any
    ):
        folder.mkdir(exist_ok=True)
        self.recipe, self.examples, self.job = recipe_for(base, folder, **sections), examples, Recorder(folder)
        quantize = self.recipe.model.quantization
        torch.manual_seed(0)
        self.model = attach(
            load_base(base, quantize=quantize, dtype=torch.float32),
            plan_placement(self.recipe, recipe_base(self.recipe)),
        )
        set_expert_path(self.model, cast(Any, path))
        self.tokenizer = AutoTokenizer.from_pretrained(base)

    def train(self) -> dict[str, Any]:
        return trainer_for(self.recipe.training.method)(
            self.model, self.tokenizer, self.recipe, self.examples, cast(Job, self.job)
        )

    def adapter(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(request.param, tmp_path_factory.mktemp("online") / request.param)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base("qwen3_moe", tmp_path_factory.mktemp("online") / "qwen3_moe")


def trainers_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers that are made from here on, and what each of their generations gave."""
    made: list[Any] = []
    original = online.OnlineTrainer._generate_and_score_completions

    def keep(self: Any, inputs: Any) -> Any:
        if self not in made:
            made.append(self)
            self.outputs = []
        output = original(self, inputs)
        self.outputs.append(output)
        return output

    monkeypatch.setattr(online.OnlineTrainer, "_generate_and_score_completions", keep)
    return made


def slow_logps(model: nn.Module, output: dict[str, Any]) -> Tensor:
    """(rows, completion tokens) log-probabilities of the completions, a row at a time, by the full softmax."""
    found = torch.zeros(output["completion_ids"].shape)
    rows = zip(
        output["prompt_ids"], output["prompt_mask"], output["completion_ids"], output["completion_mask"], strict=True
    )
    lines = []
    for prompt, prompt_mask, completion, mask in rows:
        prompt, completion = prompt[prompt_mask.bool()], completion[mask.bool()]
        logits = model(input_ids=torch.cat([prompt, completion])[None], use_cache=False).logits[0].double()
        places = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
        line = logits[places].log_softmax(-1)[torch.arange(len(completion)), completion]
        lines.append(torch.cat([line, line.new_zeros(found.shape[1] - len(completion))]))
    return torch.stack(lines)


# -------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_the_reference_is_the_base_and_there_is_no_second_adapter(
    base: Path, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainers_of(monkeypatch)
    training = {"method": method, "max_steps": 3}
    run = Run(base, tmp_path, model={"quantization": "none"}, training=training, trl={"beta": 0.5})
    fresh = run.adapter()
    run.train()
    (trainer,) = made
    assert list(run.model.peft_config) == ["default"] and trainer.ref_model is None and trainer.beta == 0.5
    assert all(not torch.equal(fresh[name], now) for name, now in run.adapter().items() if name.endswith("_B.default"))
    output = trainer.outputs[-1]  # of step 3: the adapters are no longer what they began with
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        reference, policy = slow_logps(stock, output), slow_logps(run.model.eval(), output)
    if method == "grpo":
        mask = output["completion_mask"].bool()
        assert (output["ref_per_token_logps"].double() - reference)[mask].abs().max() < 1e-4
        assert (policy - reference)[mask].abs().max() > 1e-2
    kls = [row["kl"] for row in run.job.of("train")]
    assert kls[0] == pytest.approx(0, abs=1e-6) and abs(kls[2]) > 1e-4


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_an_adapter_that_is_trained_further_is_held_to_what_it_was(
    qwen: Path, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainers_of(monkeypatch)
    training = {"method": method, "max_steps": 3}
    run = Run(qwen, tmp_path, model={"quantization": "none"}, training=training, trl={"beta": 0.5})
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if parameter.requires_grad and "_B" in name:
                parameter.normal_(std=0.05)
    adapter = run.recipe.adapter.model_copy(update={"start_from": tmp_path})
    run.recipe = run.recipe.model_copy(update={"adapter": adapter})
    start = run.adapter()
    run.train()
    kls = [row["kl"] for row in run.job.of("train")]
    assert kls[0] == pytest.approx(0, abs=1e-6) and abs(kls[2]) > 1e-4, "the base is far from the start"
    if method == "grpo":
        output = made[0].outputs[-1]
        with torch.no_grad():
            for name, parameter in run.model.named_parameters():
                if name in start:
                    assert not torch.equal(parameter, start[name])
                    parameter.copy_(start[name])
            began = slow_logps(run.model.eval(), output)
        mask = output["completion_mask"].bool()
        assert (output["ref_per_token_logps"].double() - began)[mask].abs().max() < 1e-4


def test_the_gradient_is_that_of_the_slow_loss(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of GRPO (loss_type dapo, TRL's default): -sum of advantage x log-probability over all tokens."""
    made, grads = trainers_of(monkeypatch), dict[str, Tensor]()

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            grads.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    original = online.callbacks
    monkeypatch.setattr(online, "callbacks", lambda *given: [*original(*given), Catch()])
    training = {"max_steps": 1, "max_grad_norm": 0.0, "batch_size": 4, "gradient_accumulation_steps": 2}
    run = Run(base, tmp_path, model={"quantization": "none"}, training=training)
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if parameter.requires_grad and "_B" in name:
                parameter.normal_(std=0.05)
    start = run.adapter()
    run.train()
    output = made[0].outputs[0]
    assert output["advantages"].abs().max() > 0.1, "the seed draws no group with a difference"
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if name in start:
                parameter.copy_(start[name])
    run.model.zero_grad()
    logps = slow_logps(run.model, output)
    loss = -(logps * output["advantages"][:, None] * output["completion_mask"]).sum() / output["completion_mask"].sum()
    loss.backward()
    wanted = {name: p.grad for name, p in run.model.named_parameters() if p.requires_grad and p.grad is not None}
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert torch.allclose(grads[name], cast(Tensor, grad), atol=2e-5, rtol=1e-3), name


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_rewards_that_are_alike_teach_nothing(method: str, qwen: Path, tmp_path: Path) -> None:
    """0.2 has no exact mean in float32: what rounding leaves of it is no signal, which AdamW would blow up to steps."""
    rewards = [{"function": "length", "longest_characters": 100_000, "weight": 0.2}]
    run = Run(
        qwen,
        tmp_path,
        rewards=rewards,
        sampling={"completions": 8},
        training={"method": method, "batch_size": 16, "max_steps": 2},
    )
    start = run.adapter()
    trained = run.train()
    assert all(torch.equal(start[name], found) for name, found in run.adapter().items())
    (said,) = trained["warnings"]
    assert said.startswith("in 100 % of the groups all answers were rewarded alike, so nothing was learned; raise")
    assert warnings(run.job.rows) == [said], "the terminal and the page show it"
    rows = [row for row in run.job.rows if row["kind"] == "train"]
    assert [row["frac_reward_zero_std"] for row in rows] == [1.0, 1.0]
    assert all(abs(row["reward"] - 0.2) < 1e-6 and row["grad_norm"] == 0 for row in rows)


def test_only_what_rounding_left_is_made_equal() -> None:
    """0.1 + 0.2 and 0.3 are one reward, and so is 0.2 three times; 0.2 and 0.2001 are two, and their group stays."""
    rewards = torch.tensor([[0.1, 0.2], [0.3, 0.0], [0.0, 0.3], [0.2, 0], [0.2, 0], [0.2001, 0]]).double()
    equal, share = online.alike_made_equal(rewards, torch.tensor([0.7, 0.7]), group=3)
    assert share == 0.5 and not online.taught_nothing([share, 1.0]) and online.taught_nothing([1.0, 0.9])
    assert torch.equal(equal[3:], rewards[3:]) and torch.allclose(equal, rewards, atol=1e-7, rtol=0)
    sums = (equal[:3] * 0.7).sum(-1)
    assert (sums - sums[0]).abs().max() < 1e-15 < ((rewards[:3] * 0.7).sum(-1) - sums[0]).abs().max()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_samples_are_drawn_in_evaluation_mode_from_the_cache_and_the_router_counts_the_learning_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    made = trainers_of(monkeypatch)
    run = Run(base, tmp_path, training={"gradient_checkpointing": checkpointing}, trl={"beta": 0.1})
    seen: list[tuple[bool, bool, int]] = []

    def note(module: nn.Module, _args: Any, inputs: dict[str, Any]) -> None:
        if not cast(Any, note).off:
            seen.append((torch.is_grad_enabled(), module.training, inputs["input_ids"].shape[1]))

    cast(Any, note).off = False
    decoder_and_head(run.model)[0].register_forward_pre_hook(note, with_kwargs=True)
    run.train()
    assert {training for grad, training, _ in seen if grad} == {True}
    assert {training for grad, training, _ in seen if not grad} == {False}
    single = [length for grad, _, length in seen if not grad and length == 1]
    assert len(single) >= 2 * 2, "every token after the first of a completion is one position: the cache is used"
    for row, output in zip(run.job.of("router"), made[0].outputs, strict=True):
        assert row["tokens"] == int(output["prompt_mask"].sum() + output["completion_mask"].sum())


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_checkpoints_generation_config_does_not_bend_what_is_learned_from(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """TRL's own config of the generation leaves open what it has no number for, and the checkpoint's fills it."""
    original, used = GenerationMixin._get_logits_processor, list[Any]()

    def keep(model: Any, *args: Any, **options: Any) -> Any:
        found = original(model, *args, **options)
        used.extend(found)
        return found

    monkeypatch.setattr(GenerationMixin, "_get_logits_processor", keep)
    for trl, names in (
        ({}, set()),
        ({"generation_kwargs": {"no_repeat_ngram_size": 2}}, {"NoRepeatNGramLogitsProcessor"}),
    ):
        used.clear()
        training = {"method": method, "max_steps": 1}
        run = Run(qwen, tmp_path / str(len(trl)), training=training, trl=trl, sampling={"temperature": 0.5})
        run.model.generation_config.update(repetition_penalty=20.0, min_p=0.9, no_repeat_ngram_size=1)
        run.train()
        kinds = {type(one).__name__: one for one in used}
        assert set(kinds) - {"MinPLogitsWarper"} == {"TemperatureLogitsWarper", *names}
        assert "MinPLogitsWarper" not in kinds or kinds["MinPLogitsWarper"].min_p == 0


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_loss_on_the_routing_counts_once_a_step_however_many_passes_it_has(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """GRPO divides its loss by the accumulation steps itself, of RLOO's it is Trainer that does."""
    training = {"method": method, "max_steps": 1, "batch_size": 4, "gradient_accumulation_steps": 2}
    router = {"mode": "lora", "rank": 2, "z_loss_coef": 1e-3}
    losses = []
    for extra in (0.0, 8.0):
        monkeypatch.setattr(RouterWatch, "take", lambda self, *_, extra=extra: extra)
        run = Run(qwen, tmp_path / str(extra), training=training, router=router)
        run.train()
        losses.append(run.job.of("train")[0]["loss"])
    assert losses[1] - losses[0] == pytest.approx(8.0, abs=1e-4)


def test_paths_and_checkpointing_train_the_same_adapter(qwen: Path, tmp_path: Path) -> None:
    ways: dict[str, dict[str, Any]] = {
        "fast": {},
        "lean": {"path": "lean"},
        "checkpointing": {"training": {"gradient_checkpointing": True}},
    }
    found = {}
    for name, options in ways.items():
        run = Run(qwen, tmp_path / name, **options)
        run.train()
        found[name] = run.adapter(), files.read_json_lines(tmp_path / name / "samples.jsonl")
    for sample in found["fast"][1]:
        assert sample["reward"] == bool(re.search(EVEN, sample["completion"])), "a reward went to another completion"
    for name in ("lean", "checkpointing"):
        assert found[name][1] == found["fast"][1]
        for parameter, value in found["fast"][0].items():
            assert torch.allclose(found[name][0][parameter], value, atol=1e-4), (name, parameter)


# -------------------------------------------------------------------- what stops it


def test_an_adapter_that_became_nan_stops_before_the_next_generation(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(math.nan)

    original = online.callbacks
    monkeypatch.setattr(online, "callbacks", lambda *given: [*original(*given), Poison()])
    with pytest.raises(TrainingError, match=r"NaN or infinity after step 1.*no adapter was written"):
        Run(qwen, tmp_path).train()


def test_a_failing_reward_ends_the_training_with_the_row(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_attempt: Attempt) -> float:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(online, "rewards_of", lambda recipe: [Reward("mine", 1.0, 0, 1, each(broken))])
    with pytest.raises(
        RewardError, match=r"the reward mine failed: ZeroDivisionError.*tickets-eval.jsonl line.*completion"
    ):
        Run(qwen, tmp_path).train()


# -------------------------------------------------------------------- how many steps


@pytest.mark.parametrize(
    ("examples", "training", "trl"),
    [
        (8, {"epochs": 2}, {}),
        (7, {"epochs": 1.5, "batch_size": 4}, {}),
        (8, {"epochs": 1, "batch_size": 4, "gradient_accumulation_steps": 2}, {}),
        (8, {"epochs": 1, "batch_size": 4, "gradient_accumulation_steps": 3}, {}),
        (8, {"epochs": 3, "batch_size": 4}, {"steps_per_generation": 3}),
        (7, {"epochs": 1}, {"num_iterations": 2}),
        (8, {"epochs": 1, "batch_size": 4}, {"generation_batch_size": 16, "num_iterations": 3}),
    ],
)
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_the_plan_counts_the_steps_that_trl_does(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, examples: int, training: Any, trl: Any
) -> None:
    counted: list[tuple[int, int]] = []

    def count(trainer: Any) -> dict[str, Any]:
        loader = trainer.get_train_dataloader()
        steps = trainer.set_initial_training_values(trainer.args, loader)[-1]
        counted.append((steps, len({row["row"] for row in next(iter(loader))})))
        return {"steps": 0, "loss": 0.0}

    monkeypatch.setattr(online, "finish", count)
    run = Run(qwen, tmp_path, EXAMPLES[:examples], training={"max_steps": None, "method": method, **training}, trl=trl)
    run.train()
    assert counted == [(total_steps(run.recipe, examples), generations(run.recipe, examples).prompts)]


def test_too_few_examples_for_one_generation_are_refused_by_the_plan(tmp_path: Path) -> None:
    recipe = recipe_for("embedded", tmp_path, training={"max_steps": None, "epochs": 1, "batch_size": 64})
    with pytest.raises(DataError, match="has 3 examples, and one generation takes 16 prompts"):
        total_steps(recipe, 3)


# -------------------------------------------------------------------- sampling and rejection


def test_sampling_draws_what_the_model_says(qwen: Path, tmp_path: Path) -> None:
    """How often the likeliest tokens come first in many draws, against the softmax at that temperature.

    Some checkpoints ship a generation_config.json that bends what is drawn.
    """
    sampling = {"completions": 1024, "max_new_tokens": 1, "temperature": 0.5}
    run = Run(qwen, tmp_path, training={"method": "rejection"}, sampling=sampling)
    run.model.generation_config.update(repetition_penalty=20.0, min_p=0.9, no_repeat_ngram_size=1)
    example = EXAMPLES[0]
    drawn = draw(cast(Any, run.model), run.tokenizer, [example], run.recipe.sampling, rows=64, seed=1)[0]
    assert len(drawn) == 1024 and run.model.training
    with torch.no_grad():
        ids = torch.tensor([prompt_ids(run.tokenizer, example)])
        wanted = (run.model.eval()(input_ids=ids).logits[0, -1].double() / 0.5).softmax(-1)
    counts: dict[str, int] = defaultdict(int)
    for one in drawn:
        counts[one.text] += 1
    texts = run.tokenizer.batch_decode([[token] for token in range(len(wanted))], skip_special_tokens=True)
    top = {texts[token] for token in wanted.topk(50).indices.tolist()}
    expected = sum(share for text, share in zip(texts, wanted.tolist(), strict=True) if text in top)
    assert abs(sum(counts[text] for text in top) / 1024 - expected) < 4 * math.sqrt(expected * (1 - expected) / 1024)


def test_rejection_trains_on_what_was_accepted_and_keeps_the_rest_to_look_at(base: Path, tmp_path: Path) -> None:
    training = {"method": "rejection", "max_steps": 2, "batch_size": 4}
    sampling = {"threshold": 1.0, "keep": 2, "rounds": 2, "completions": 4}
    run = Run(base, tmp_path, training=training, sampling=sampling)
    cast(Any, run.model.generation_config).eos_token_id = list(range(100, 1000))  # random weights hardly ever end
    fresh = run.adapter()
    trained = run.train()
    rows = files.read_json_lines(tmp_path / "samples.jsonl")
    assert trained["steps"] == 4 and len(trained["rounds"]) == 2
    for number, logged in enumerate(run.job.of("rejection"), 1):
        own = [row for row in rows if row["round"] == number]
        assert len(own) == 8 * 4 == logged["sampled"]
        assert (
            logged["acceptance"]
            == sum(row["reward"] >= 1 and row["fate"] not in ("clipped", "empty") for row in own) / 32
        )
        kept = [row for row in own if row["fate"] == "kept"]
        assert logged["kept"] == len(kept) > 0 and all(row["reward"] >= 1 for row in kept)
        assert len({(row["prompt"], row["completion"]) for row in kept}) == len(kept)
    assert any(not torch.equal(fresh[name], now) for name, now in run.adapter().items())


def test_rejection_that_accepts_nothing_says_so(qwen: Path, tmp_path: Path) -> None:
    run = Run(
        qwen,
        tmp_path,
        training={"method": "rejection", "max_steps": 1},
        rewards=[{"function": "exact_match"}],
    )
    with pytest.raises(TrainingError, match=r"none of the 32 sampled completions was accepted.*lower threshold"):
        run.train()
    assert len(files.read_json_lines(tmp_path / "samples.jsonl")) == 32


# -------------------------------------------------------------------- real jobs


@pytest.mark.parametrize("method", ["grpo", "rejection"])
def test_a_job_on_the_embedded_base(method: str, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, method)
    run = studio("run", recipe, "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    result, job = json.loads(run.stdout)["result"], open_job(tmp_path / "job")
    assert {"reward", "reward/regex", "reward/length"} <= set(result["after"]["metrics"])
    samples = files.read_json_lines(job.path / "samples.jsonl")
    assert samples and set(samples[0]) >= {"prompt", "completion", "reference", "reward", "rewards"}
    if method == "grpo":
        rows = [row for row in job.metrics() if row["kind"] == "train"]
        assert {"reward", "rewards_regex_mean", "completions_mean_length", "completions_clipped_ratio"} <= set(rows[0])
        assert len(result["trained"]["samples"]["first"]) == 4
        assert (job.path / "pictures" / "rewards.png").is_file()
    else:
        assert result["trained"]["rounds"][0]["sampled"] == len(samples)
    shown = studio("jobs", "show", job.path)
    assert "reward" in shown.stdout


def test_a_job_learns_from_prompts_alone_by_the_tests_that_their_programs_pass(tmp_path: Path) -> None:
    """The shipped recipe, shortened: no row has a completion, and each reward is what the tests say of that program."""
    recipe = yaml.safe_load((REPOSITORY / "recipes" / "embedded-grpo-code.yaml").read_text())
    recipe["data"] |= {name: str(REPOSITORY / "recipes" / recipe["data"][name]) for name in ("train", "eval")}
    recipe["training"] |= {"max_steps": 2}
    recipe["evaluation"] |= {"examples": 6, "generations": 2}
    recipe["output"] = {"dir": str(tmp_path / "job")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = studio("run", tmp_path / "recipe.yaml")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Held-out reward" in run.stdout and "differs" not in run.stdout and "reference" not in run.stdout
    job = open_job(tmp_path / "job")
    result = json.loads((job.path / "result.json").read_text())
    for side in (result["before"], result["after"]):
        assert side["loss"] is None and side["exact_match"] is None and side["examples"] == 6
        assert set(side["metrics"]) == {"reward", "reward/code"} and side["metrics"]["reward"]["n"] == 6
    rows = {row["prompt"]: row["tests"] for row in files.read_json_lines(Path(recipe["data"]["train"]))}
    samples = files.read_json_lines(job.path / "samples.jsonl")
    assert len(samples) == 2 * 8 and len({sample["reward"] for sample in samples}) > 1
    for sample in samples:
        assert sample["reference"] is None
        assert sample["reward"] == sum(_survives(sample["completion"], test) for test in rows[sample["prompt"]]) / 2
    train = [row for row in job.metrics() if row["kind"] == "train"]
    assert 0 < train[0]["reward"] < 1 and train[0]["rewards_code_mean"] == train[0]["reward"]
    again = studio("evaluate", job.path, "--batch-size", "3", "--json")
    assert again.returncode == 0, again.stdout + again.stderr
    assert json.loads(again.stdout)["after"]["metrics"]["reward"] == result["after"]["metrics"]["reward"]


def _survives(program: str, test: str) -> bool:
    """Whether a program of the base's, which has seen nothing but small functions, passes; run right here."""
    try:
        scope: dict[str, Any] = {}
        exec(program, scope)
        exec(test, scope)
    except Exception:
        return False
    return True


def _recipe(folder: Path, method: str) -> Path:
    path = write_recipe(
        folder / "recipe.yaml",
        training={"method": method, "max_steps": 2},
        sampling={"completions": 4, "max_new_tokens": 12},
    )
    recipe = yaml.safe_load(path.read_text())
    recipe["data"]["train"] = str(TICKETS / "tickets-eval.jsonl")
    recipe["rewards"] = [
        {"function": "regex", "pattern": "[A-Z]"},
        {"function": "length", "longest_characters": 99, "weight": 0.1},
    ]
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_the_rewards_of_a_recipe_are_named_in_its_order(tmp_path: Path) -> None:
    recipe = recipe_for("embedded", tmp_path, rewards=[{"function": "json_fields"}, {"function": "exact_match"}])
    assert [reward.name for reward in rewards_of(recipe)] == ["json_fields", "exact_match"]
