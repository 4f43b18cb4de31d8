"""Rows reach TRL's trainers in the order and shares that were planned; jobs on mixtures, selections and streams."""

from __future__ import annotations

import gzip
import importlib
import json
import re
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from adapters.loading import load_base
from adapters.lora import attach
from adapters.router_profile import load_profile
from studio import make_plan, open_job
from studio.data import of_recipe, training_rows
from studio.data.curriculum import in_training_order
from studio.errors import DataError
from studio.jobs import Job
from studio.methods import METHODS
from studio.placing import plan_placement
from studio.plan import Plan, recipe_base, row_tokens
from studio.recipe import Recipe, load_recipe
from studio.reward_model import add_reward_head
from studio.trainers import sft
from studio.trainers.common import StudioTrainer
from studio.trainers.encoded import dataset, labelled_tokens, streamed_rows
from tests.e2e.conftest import TICKETS, build_base, studio, write_recipe
from tests.e2e.runs import Recorder


def write_rows(path: Path, count: int) -> Path:
    rows = ({"prompt": f"{path.stem} question {n}", "completion": "word " * (1 + n % 7)} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sources(folder: Path) -> list[dict[str, str]]:
    return [{"path": str(write_rows(folder / f"{name}.jsonl", count))} for name, count in (("red", 40), ("blue", 12))]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base("qwen3_moe", tmp_path_factory.mktemp("mixtures") / "base")


def prompts_read(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The questions of each step's batches, as TRL's trainer got them."""
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.base)
    seen: list[list[str]] = []

    class Watching(sft._Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            texts = tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
            seen.append([found.group() for text in texts if (found := QUESTION.search(text))])
            return super().training_step(model, inputs, *args, **kwargs)

    monkeypatch.setattr(sft, "_Trainer", Watching)
    model = load_base(Path(recipe.model.base), quantize="none", dtype=torch.float32)
    attached = attach(model, plan_placement(recipe, recipe_base(recipe)))
    rows = in_training_order(recipe, training_rows(recipe))
    done = sft.train(attached, tokenizer, recipe, rows, cast(Job, Recorder(folder, make_plan(recipe))))
    assert done["steps"] == recipe.training.max_steps
    return seen


def recipe_of(base: Path, folder: Path, data: dict[str, Any], **training: Any) -> Recipe:
    sections = {
        "model": {"base": str(base), "quantization": "none"},
        "data": {"eval": None, **data},
        "adapter": {"attention_rank": 2, "shared_expert_rank": 0, "routed_experts_rank": 0},
        "router": {"watch": False},
        "training": {"batch_size": 4, "max_steps": 9, "gradient_accumulation_steps": 2, **training},
    }
    return load_recipe(write_recipe(folder / "recipe.yaml", **sections))


QUESTION = re.compile(r"(red|blue) question \d+")


def name_of(question: str) -> str:
    return question.split()[0]


PHASES = [{"until_steps": 3, "weights": {"red": 1}}, {"weights": {"red": 1, "blue": 3}}]


def test_rows_reach_trl_in_the_planned_order(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(base, tmp_path, {"train": sources(tmp_path), "phases": PHASES})
    seen = prompts_read(recipe, tmp_path, monkeypatch)
    planned = in_training_order(recipe, training_rows(recipe))
    assert len(planned) == 9 * 8 and len(seen) == 9 * 2
    wanted = [cast(Any, row).prompt[0].content for row in planned]
    assert [question for batch in seen for question in batch] == wanted
    assert {name_of(text) for text in wanted[:24]} == {"red"}
    assert all(Counter(map(name_of, wanted[n : n + 4])) == {"red": 1, "blue": 3} for n in range(24, 72, 4))


def test_a_stream_reaches_trl_in_its_shares(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(base, tmp_path, {"train": sources(tmp_path), "phases": PHASES, "streaming": True})
    seen = [question for batch in prompts_read(recipe, tmp_path, monkeypatch) for question in batch]
    assert len(seen) == 72 and len(set(seen)) > 30
    assert {name_of(question) for question in seen[:24]} == {"red"}
    assert all(Counter(map(name_of, seen[n : n + 4])) == {"red": 1, "blue": 3} for n in range(24, 72, 4))


def test_a_streams_phases_end_by_the_tokens_that_the_plan_counts(base: Path, tmp_path: Path) -> None:
    phases = [{"until_tokens": 400, "weights": {"red": 1}}, {"weights": {"blue": 1}}]
    recipe = recipe_of(base, tmp_path, {"train": sources(tmp_path), "phases": phases, "streaming": True})
    names = [name_of(cast(Any, row).prompt[0].content) for row in islice(streamed_rows(recipe), 60)]
    reds = names.count("red")
    assert names == ["red"] * reds + ["blue"] * (60 - reds) and reds > 5
    tokens = row_tokens(recipe, training_rows(recipe)[:40])  # the 40 rows of red
    assert min(tokens) * (reds - 1) < 400 <= max(tokens) * reds


def pair_lines(name: str, count: int) -> list[str]:
    pairs = ({"prompt": f"{name} question {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(count))
    return [json.dumps(pair) + "\n" for pair in pairs]


def pair_sources(folder: Path) -> list[dict[str, str]]:
    for name, count in (("red", 40), ("blue", 12)):
        (folder / f"{name}.jsonl").write_text("".join(pair_lines(name, count)))
    return [{"path": str(folder / f"{name}.jsonl")} for name in ("red", "blue")]


def columns_read(trainer: Any, column: str, batches: int) -> list[str]:
    """The questions in the first batches of a trainer's loader."""
    decode = trainer.processing_class.batch_decode
    texts = [text for batch in islice(trainer.get_train_dataloader(), batches) for text in decode(batch[column])]
    return [found.group() for text in texts if (found := QUESTION.search(text))]


@pytest.mark.parametrize("streaming", [False, True])
def test_kto_reads_the_sides_of_pairs_in_the_phases_that_were_planned(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    data = {"train": pair_sources(tmp_path), "phases": PHASES, "streaming": streaming}
    recipe = recipe_of(base, tmp_path, data, method="kto")
    made = make_plan(recipe)
    assert made.mixture is not None and [phase.rows for phase in made.mixture.phases] == [24, 48]
    rows = in_training_order(recipe, training_rows(recipe), made.total_steps)
    seen = columns_read(trainer_of(recipe, rows, made, tmp_path, monkeypatch), "input_ids", 18)
    assert len(seen) == 72 and {name_of(question) for question in seen[:24]} == {"red"}
    assert all(Counter(map(name_of, seen[n : n + 4])) == {"red": 1, "blue": 3} for n in range(24, 72, 4))


def trainer_of(recipe: Recipe, rows: Any, made: Plan, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The trainer of the recipe's method as it is before its first step."""
    module = importlib.import_module(METHODS[recipe.training.method].trainer)
    model = load_base(Path(recipe.model.base), quantize="none", dtype=torch.float32)
    attached = attach(model, plan_placement(recipe, recipe_base(recipe)))
    if METHODS[recipe.training.method].scores:
        add_reward_head(attached)
    monkeypatch.setattr(module, "finish", lambda trainer: trainer)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.base)
    return module.train(attached, tokenizer, recipe, rows, cast(Job, Recorder(folder, made)))


def test_reward_models_read_streamed_pairs_and_refuse_those_that_prefer_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "red.jsonl"
    path.write_text("".join(pair_lines("red", 30)))
    recipe = recipe_of(base, tmp_path, {"train": str(path), "streaming": True}, method="reward")
    trainer = trainer_of(recipe, training_rows(recipe), make_plan(recipe), tmp_path, monkeypatch)
    assert len(set(columns_read(trainer, "input_ids", 15))) == 30
    long = {"prompt": "red question 30", "chosen": "word " * 400 + "yes", "rejected": "word " * 400 + "no"}
    path.write_text(path.read_text() + json.dumps(long) + "\n")
    with pytest.raises(DataError, match=r"red\.jsonl.*\n.*line 31: holds nothing to learn once it is cut"):
        list(islice(trainer.get_train_dataloader(), 20))


def test_a_streamed_prompt_that_fills_the_length_is_refused_with_its_line(base: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "red.jsonl", 3)
    path.write_text(path.read_text() + json.dumps({"prompt": "word " * 400, "completion": "yes"}) + "\n")
    recipe = recipe_of(base, tmp_path, {"train": str(path), "streaming": True})
    encode = partial(labelled_tokens, AutoTokenizer.from_pretrained(base), 256, "completion")
    with pytest.raises(DataError, match=r"red\.jsonl.*\n.*line 4: holds nothing to learn"):
        list(islice(dataset(recipe, [], encode), 4))


@pytest.mark.parametrize("trainer", [DPOTrainer, KTOTrainer, RewardTrainer])
def test_every_trainer_of_trl_reads_planned_rows_front_to_back(trainer: type) -> None:
    made = _unmade(trainer, "sequential")
    assert isinstance(made._get_train_sampler(), SequentialSampler)
    assert list(made._get_train_sampler()) == list(range(20))
    assert list(_unmade(trainer, "random")._get_train_sampler()) != list(range(20))


@pytest.mark.parametrize("trainer", [GRPOTrainer, RLOOTrainer])
def test_trainers_that_repeat_prompts_take_them_in_order(trainer: type) -> None:
    assert list(_unmade(trainer, "sequential")._get_train_sampler()) == [n for n in range(20) for _ in range(2)]
    assert list(_unmade(trainer, "random")._get_train_sampler()) != [n for n in range(20) for _ in range(2)]


def _unmade(trainer: type, strategy: str) -> Any:
    """A trainer of the studio on TRL's class with what its sampler reads, and without a model."""
    made: Any = object.__new__(type("Made", (StudioTrainer, trainer), {}))
    made.args = SimpleNamespace(
        train_sampling_strategy=strategy, seed=0, data_seed=None, generation_batch_size=4, steps_per_generation=1
    )
    made.train_dataset, made.shuffle_dataset = list(range(20)), True
    made.num_generations, made.num_iterations, made.calculate_KL = 2, 1, False
    if trainer not in (GRPOTrainer, RLOOTrainer):
        del made.shuffle_dataset
    return made


# -------------------------------------------------------------------- whole jobs


def test_a_job_on_a_curriculum_with_selection_and_split(tmp_path: Path) -> None:
    base = build_base("llama4_text", tmp_path / "base")
    tickets = tmp_path / "tickets.jsonl"
    tickets.write_text("".join((TICKETS / "tickets-train.jsonl").read_text().splitlines(keepends=True)[:80]))
    data = {
        "train": [{"path": str(tickets)}, {"path": str(TICKETS / "known-tasks.jsonl"), "name": "known"}],
        "eval": None,
        "eval_fraction": 0.1,
        "drop_easiest": 0.5,
        "drop_hardest": 0.05,
        "phases": [{"until_steps": 4, "weights": {"known": 1}}, {"weights": {"known": 1, "tickets": 3}}],
        "leakage": "refuse",
    }
    recipe = write_recipe(tmp_path / "recipe.yaml", model={"base": str(base)}, data=data)
    run = studio("run", recipe)
    assert run.returncode == 1 and "studio data score" in run.stderr
    score = studio("data", "score", recipe, "--out", tmp_path / "scores", "--json")
    assert score.returncode == 0, score.stderr
    report = json.loads(score.stdout)
    assert not report["reused"] and report["drop_easiest"] == 0.5 and report["drop_hardest"] == 0.05
    assert json.loads(studio("data", "score", recipe, "--json").stdout)["reused"]
    run = studio("run", recipe, "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    job = open_job(tmp_path / "job")
    plan = job.plan()
    assert plan.eval_examples == 8 and json.loads(run.stdout)["result"]["after"]["examples"] == 8
    assert plan.mixture is not None and plan.leaks is not None and plan.leaks.found == 0
    counts = {row["source"]: row for row in report["sources"]}
    for source in plan.mixture.sources:
        assert source.rows == counts[source.name]["rows"] - sum(
            counts[source.name][why] for why in ("easiest", "hardest")
        )
    assert {source.name: source.read for source in plan.mixture.sources} == {"known": 32 + 8, "tickets": 24}
    for name in ("kept", "left_out"):
        of_job, shown = (folder / f"{name}.jsonl" for folder in (job.path, tmp_path / "scores"))
        assert of_job.read_text() == shown.read_text()
    kept = [json.loads(line) for line in (job.path / "kept.jsonl").read_text().splitlines()]
    assert len(kept) == plan.train_examples and kept[0]["score"] >= kept[-1]["score"]
    assert (job.path / "pictures" / "scores.png").is_file() and (tmp_path / "scores" / "scores.png").is_file()
    assert set(load_profile(job.path / "profile.safetensors").sources) == {"known", "tickets"}


def test_a_job_that_streams_its_data(tmp_path: Path) -> None:
    base = build_base("qwen3_moe", tmp_path / "base")
    path = write_rows(tmp_path / "rows.jsonl", 3000)
    sections: dict[str, Any] = {
        "model": {"base": str(base)},
        "adapter": {"shared_expert_rank": 0},
        "data": {"train": str(path), "streaming": True},
        "trl": {"packing": True},
    }
    recipe = write_recipe(tmp_path / "recipe.yaml", **sections)
    assert "is valid: 3,000 training examples" in studio("validate", recipe).stdout
    run = studio("run", recipe, "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout)["result"]
    assert result["steps"] == 8 and result["after"]["loss"] < result["before"]["loss"]
    assert open_job(tmp_path / "job").plan().sampled
    path.write_text(path.read_text() + '{"prompt": "no answer"}\n')
    checked = studio("validate", recipe)
    assert checked.returncode == 1 and "line 3001, completion: is missing" in checked.stderr


def test_a_dpo_job_that_streams_pairs_from_a_compressed_file(tmp_path: Path) -> None:
    base, path = build_base("qwen3_moe", tmp_path / "base"), tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress("".join(pair_lines("red", 5000)).encode()))  # more than a buffer, and the sample
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        model={"base": str(base)},
        adapter={"shared_expert_rank": 0},
        data={"train": str(path), "streaming": True, "eval": str(TICKETS / "ticket-pairs-eval.jsonl")},
        training={"method": "dpo"},
    )
    run = studio("run", recipe, "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout)["result"]
    assert result["steps"] == 8 and "preference_accuracy" in result["after"]["metrics"]
    losses = [row["loss"] for row in open_job(tmp_path / "job").metrics() if row["kind"] == "train"]
    assert len(losses) == 8 and losses[-1] < losses[0]


def test_a_bad_row_in_a_stream_ends_the_training_with_its_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "red.jsonl", 20)
    recipe = recipe_of(base, tmp_path, {"train": str(path), "streaming": True})
    path.write_text(path.read_text() + '{"prompt": "no answer"}\n')
    monkeypatch.setattr(of_recipe, "SAMPLE_ROWS", 20)
    with pytest.raises(DataError, match=r"red\.jsonl.*\n.*line 21, completion: is missing"):
        prompts_read(recipe, tmp_path, monkeypatch)
