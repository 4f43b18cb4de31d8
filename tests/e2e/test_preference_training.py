"""Preference methods over 4-bit experts with expert LoRA: the losses, the reference, what the watch counts."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM

from adapters.peft_files import save_adapter
from studio.data import Labelled, Message, Place, Preference, Row, sequences
from studio.encoding import prompt_and_whole
from studio.errors import DataError, TrainingError
from studio.methods import METHODS
from studio.pairs import check_pairs, pair_ids
from studio.placing import plan_placement
from studio.plan import recipe_base
from studio.preference import answer_logps, batches, evaluate_labels, evaluate_preferences, reference_kl
from studio.reward_model import RewardModel, load_reward_head, save_reward_head
from tests.e2e.conftest import build_base
from tests.e2e.runs import Run

FAMILIES = ("llama4_text", "qwen3_moe")
PREFERENCE = [name for name, method in METHODS.items() if name != "sft" and not method.samples]
OPTIONS: dict[str, dict[str, Any]] = {"exo_pair": {"label_smoothing": 0.001}, "robust": {"label_smoothing": 0.1}}


def pair(n: int) -> Preference:
    return Preference(
        (Message("user", f"It leaks at Marlow. {'Really. ' * n}"),),
        (Message("assistant", f'{{"asset": "PMP-{n:04d}"}}'),),
        (Message("assistant", f"asset {n} {'no ' * n}"),),
    )


PAIRS = [pair(n) for n in range(1, 5)]
LABELLED: list[Row] = [Labelled(p.prompt, p.chosen, True) for p in PAIRS] + [
    Labelled(p.prompt, p.rejected, False) for p in PAIRS
]


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(request.param, tmp_path_factory.mktemp(request.param) / "base")


@pytest.mark.parametrize("method", PREFERENCE)
def test_every_method_trains_the_adapters_of_4_bit_experts_and_nothing_else(
    base: Path, tmp_path: Path, method: str
) -> None:
    rows = LABELLED if method == "kto" else PAIRS
    batch = len(rows)  # all rows in each step
    run = Run(base, rows, tmp_path, method, training={"batch_size": batch, "max_steps": 2})
    frozen, adapters = run.frozen(), run.adapters()
    run.train()
    assert all(torch.equal(was, run.frozen()[name]) for name, was in frozen.items())
    changed = {name for name, was in run.adapters().items() if not torch.equal(was, adapters[name])}
    assert any(".experts." in name for name in changed) and any("self_attn" in name for name in changed)
    train = run.job.of("train")
    assert len(train) == 2 and all(math.isfinite(row["loss"]) for row in train)
    assert train[1]["loss"] < train[0]["loss"]
    sides = {ids for p in PAIRS for ids in _both(run, p)}
    assert run.job.of("router")[0]["tokens"] == sum(map(len, sides))  # the policy's pass alone, without padding
    if method == "reward":
        assert any("reward_head" in name for name in changed) and {"accuracy", "margin"} <= train[0].keys()
    else:
        assert {"rewards_chosen", "rewards_rejected", "rewards_margins"} <= train[0].keys()
        assert run.job.of("reference")[-1]["kl"] > 0


def _both(run: Run, p: Preference) -> tuple[tuple[int, ...], tuple[int, ...]]:
    prompt, chosen, rejected = pair_ids(run.tokenizer, p, 96)
    return tuple(prompt + chosen), tuple(prompt + rejected)


def logps(run: Run, side: str, on: bool) -> torch.Tensor:
    """Slow: one row at a time, full logits, by transformers' own loss."""
    found = []
    for p in PAIRS:
        prompt, chosen, rejected = pair_ids(run.tokenizer, p, 96)
        answer = chosen if side == "chosen" else rejected
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        run.model.eval()
        with torch.no_grad():
            if on:
                loss = run.model(input_ids=ids, labels=labels).loss
            else:
                with run.model.disable_adapter():
                    loss = run.model(input_ids=ids, labels=labels).loss
        found.append(-loss.double() * len(answer))
    return torch.stack(found)


@pytest.mark.parametrize("precompute", [False, True])
def test_the_dpo_loss_is_that_of_the_paper_against_the_base(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precompute: bool
) -> None:
    options = {"trl": {"precompute_ref_log_probs": precompute}, "training": {"batch_size": 4}}
    run = Run(base, PAIRS, tmp_path, "dpo", preference={"beta": 0.3}, **options).randomised()
    trainer = run.trainer(monkeypatch)
    (batch,) = list(trainer.get_train_dataloader())
    loss = trainer.compute_loss(run.model.train(), batch)
    delta = logps(run, "chosen", True) - logps(run, "rejected", True)
    reference = logps(run, "chosen", False) - logps(run, "rejected", False)
    assert (delta - reference).abs().max() > 0.1
    expected = -torch.nn.functional.logsigmoid(0.3 * (delta - reference)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    if precompute:
        assert "ref_chosen_logps" in batch


def _further(run: Run, folder: Path) -> Run:
    """The run as a job has it that trains an adapter further: its model holds that adapter already."""
    adapter = run.recipe.adapter.model_copy(update={"start_from": folder})
    run.recipe = run.recipe.model_copy(update={"adapter": adapter})
    return run


def test_an_adapter_that_is_trained_further_is_compared_with_what_it_was(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _further(Run(base, PAIRS, tmp_path, "dpo", training={"batch_size": 4}).randomised(), tmp_path)
    began = logps(run, "chosen", True) - logps(run, "rejected", True)
    trainer = run.trainer(monkeypatch)
    (batch,) = list(trainer.get_train_dataloader())
    with torch.no_grad():
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(-1.5)
    before = run.adapters()
    loss = trainer.compute_loss(run.model.train(), batch)
    loss.backward()
    assert all(torch.equal(was, run.adapters()[name]) for name, was in before.items())
    assert all(p.grad is not None for p in run.model.parameters() if p.requires_grad)
    delta = logps(run, "chosen", True) - logps(run, "rejected", True)
    assert (delta - began).abs().max() > 0.1
    expected = -torch.nn.functional.logsigmoid(0.1 * (delta - began)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_dropout_is_the_policys_and_never_the_references(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """With dropout on every input a policy says another thing each time; what it is compared with does not."""
    rows = LABELLED if method == "kto" else PAIRS
    ranks = {"attention_rank": 2, "shared_expert_rank": 0, "routed_experts_rank": 2, "dropout": 0.5}
    run = _further(Run(base, rows, tmp_path, method, training={"batch_size": 4}, adapter=ranks).randomised(), tmp_path)
    trainer = run.trainer(monkeypatch)
    assert 0.5 in {module.p for module in run.model.modules() if isinstance(module, torch.nn.Dropout)}
    ids = torch.tensor([_both(run, PAIRS[0])[0]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    run.model.train()
    with torch.no_grad():
        said = [run.model(**inputs).logits for _ in range(2)]
        references = [trainer.ref_model(**inputs).logits for _ in range(2)]
    assert not torch.equal(*said) and torch.equal(*references) and run.model.training


def test_no_answer_is_its_own_mismatch_in_kto(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows in batches of two: the last is alone, and its own answer would say nothing of the KL."""
    trainer = Run(base, LABELLED[:5], tmp_path, "kto").trainer(monkeypatch)
    data = trainer.train_dataset
    answers, others = data["completion_ids"], data["KL_completion_ids"]
    assert [answers.index(other) for other in others] == [1, 0, 3, 2, 3]


@pytest.mark.parametrize("loss", METHODS["dpo"].losses)
def test_every_dpo_loss_trains(base: Path, tmp_path: Path, loss: str) -> None:
    preference = {"loss_type": [loss], **OPTIONS.get(loss, {})}
    run = Run(base, PAIRS, tmp_path, "dpo", preference=preference, training={"max_steps": 1, "batch_size": 4})
    before = run.adapters()
    row = run.train().job.of("train")[0]
    assert math.isfinite(row["loss"]) and row["grad_norm"] > 0
    assert any(not torch.equal(was, run.adapters()[name]) for name, was in before.items())


def test_several_dpo_losses_are_weighed(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(types: list[str], weights: list[float]) -> float:
        preference = {"loss_type": types, "loss_weights": weights}
        run = Run(base, PAIRS, tmp_path, "dpo", preference=preference, training={"batch_size": 4}).randomised()
        trainer = run.trainer(monkeypatch)
        return float(trainer.compute_loss(run.model, next(iter(trainer.get_train_dataloader()))).detach())

    both = loss(["sigmoid", "sft"], [0.5, 2.0])
    assert both == pytest.approx(0.5 * loss(["sigmoid"], [1.0]) + 2 * loss(["sft"], [1.0]), rel=1e-5)


def tensors_bytes() -> int:
    """Bytes of every storage that a tensor of this process holds, each once."""
    gc.collect()
    storages = {}
    for held in gc.get_objects():
        if isinstance(held, torch.Tensor) and not isinstance(held, FakeTensor):  # which an import may leave behind
            storages[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
    return sum(storages.values())


def test_the_reference_is_no_second_copy(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(base, PAIRS, tmp_path, "dpo", router={"watch": False}, training={"batch_size": 4}).randomised()
    adapter = sum(p.numel() * p.element_size() for p in run.model.parameters() if p.requires_grad)
    before = tensors_bytes()
    trainer = run.trainer(monkeypatch)
    assert list(run.model.peft_config) == ["default"] and not list(trainer.ref_model.parameters())
    grown = tensors_bytes() - before
    assert grown < adapter / 10, f"{grown} bytes more, the adapter has {adapter}"
    with torch.no_grad():
        trainer.compute_loss(run.model.eval(), next(iter(trainer.get_train_dataloader())))
    assert tensors_bytes() - before < adapter / 10


def test_losses_on_the_routing_reach_the_routers_in_dpo(base: Path, tmp_path: Path) -> None:
    coefs = {"mode": "lora", "rank": 2, "load_balance_coef": 0.1, "distill_coef": 0.1}
    run = Run(base, PAIRS, tmp_path, "dpo", router=coefs, training={"gradient_accumulation_steps": 2}).randomised()
    rows = run.train().job.of("router")
    assert rows[0]["load_balance_loss"] > 0 and rows[0]["distill_loss"] > 0


@pytest.mark.parametrize("method", PREFERENCE)
def test_a_loss_that_is_not_finite_stops_every_method(base: Path, tmp_path: Path, method: str) -> None:
    run = Run(base, LABELLED if method == "kto" else PAIRS, tmp_path, method, router={"watch": False})
    with torch.no_grad():
        next(p for n, p in run.model.named_parameters() if p.requires_grad and "lora_B" in n).fill_(math.nan)
    with pytest.raises(TrainingError, match="at step 1: training stopped and no adapter was written"):
        run.train()


# -------------------------------------------------------------------- what is measured


def test_accuracy_margin_and_kl_are_those_of_a_slow_loop(base: Path, tmp_path: Path) -> None:
    run = Run(base, PAIRS, tmp_path, "dpo")
    sides = {"max_length_tokens": 96, "batch_size": 3}
    start = evaluate_preferences(run.model, run.tokenizer, PAIRS, **sides)
    assert start["reference_kl"].metric.value == pytest.approx(0, abs=1e-6)
    run.randomised()
    found = {n: m.metric for n, m in evaluate_preferences(run.model, run.tokenizer, PAIRS, **sides).items()}
    margins = logps(run, "chosen", True) - logps(run, "rejected", True)
    assert found["preference_margin"].value == pytest.approx(margins.mean().item(), rel=1e-4)
    assert found["preference_accuracy"].value == (margins > 0).double().mean().item()
    assert found["preference_accuracy"].n == len(PAIRS)
    assert found["reference_kl"].value == pytest.approx(slow_kl(run), rel=1e-3) and found["reference_kl"].value > 1e-3


def test_labelled_rows_are_measured_by_what_the_model_adds_to_the_base(base: Path, tmp_path: Path) -> None:
    """Against a slow loop; half of the rows have the label that goes against what the adapter says."""
    run = Run(base, LABELLED, tmp_path, "kto")
    sizes = {"max_length_tokens": 96, "batch_size": 3}
    fresh = evaluate_labels(run.model, run.tokenizer, LABELLED, **sizes)
    assert fresh["label_auc"].metric.value == 0.5 and fresh["label_accuracy"].metric.value == 0  # all are ties
    run.randomised()
    rewards = {side: logps(run, side, True) - logps(run, side, False) for side in ("chosen", "rejected")}
    scores = torch.cat([rewards["chosen"], rewards["rejected"]])
    assert scores.abs().min() > 1e-3 and (scores > scores.median()).sum() == 4
    for flips in ((), (0, 5), (1, 2, 4)):
        given = cast(list[Labelled], LABELLED)
        rows = [replace(row, label=row.label ^ (n in flips)) for n, row in enumerate(given)]
        labels = torch.tensor([row.label for row in rows])
        found = evaluate_labels(run.model, run.tokenizer, rows, **sizes)
        wins = (scores[labels][:, None] > scores[~labels][None, :]).double().mean()
        assert found["label_auc"].metric.value == pytest.approx(wins.item(), abs=1e-9)
        assert found["label_accuracy"].metric.value == ((scores > 0) == labels).double().mean().item()
    assert "label_auc" not in evaluate_labels(run.model, run.tokenizer, LABELLED[:4], **sizes)
    assert not evaluate_labels(run.model, run.tokenizer, PAIRS, **sizes)


def slow_kl(run: Run) -> float:
    summed, count = 0.0, 0
    for p in PAIRS:
        prompt, chosen, _ = pair_ids(run.tokenizer, p, 96)
        ids = torch.tensor([prompt + chosen])
        with torch.no_grad():
            now = run.model(input_ids=ids).logits[0].double().log_softmax(-1)
            with run.model.disable_adapter():
                base = run.model(input_ids=ids).logits[0].double().log_softmax(-1)
        at = slice(len(prompt) - 1, len(prompt) - 1 + len(chosen))
        summed += float((now[at].exp() * (now[at] - base[at])).sum())
        count += len(chosen)
    return summed / count


def test_sides_that_are_the_same_once_cut_are_refused(base: Path, tmp_path: Path) -> None:
    run = Run(base, PAIRS, tmp_path, "dpo")
    long = tuple(Message("assistant", "word " * 200 + end) for end in ("a", "b"))
    rows = [PAIRS[0], Preference(PAIRS[0].prompt, long[:1], long[1:], place=Place("x.jsonl", 7))]
    with pytest.raises(DataError, match="line 7: chosen and rejected are the same once both are cut"):
        check_pairs(run.tokenizer, rows, 96)
    prompt, whole = prompt_and_whole(run.tokenizer, sequences(PAIRS)[0])
    assert pair_ids(run.tokenizer, PAIRS[0], 96)[:2] == (prompt, whole[len(prompt) :])


def test_a_reward_model_is_read_back_beside_stock_peft(base: Path, tmp_path: Path) -> None:
    run = Run(base, PAIRS, tmp_path, "reward", model={"base": str(base), "quantization": "none"}).train()
    sides = [ids for p in PAIRS for ids in _both(run, p)]
    ((ids, _, mask),) = list(batches([(list(side), [0] * len(side)) for side in sides], 8, torch.device("cpu")))
    with torch.no_grad():
        scores = RewardModel(run.model.eval())(ids, mask).logits
    assert scores.shape == (8, 1)
    placement = plan_placement(run.recipe, recipe_base(run.recipe))
    save_adapter(run.model, placement, tmp_path / "adapter", base_name=str(base))
    save_reward_head(run.model, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
    ).eval()
    load_reward_head(stock, tmp_path / "adapter")
    with torch.no_grad():
        alone = [RewardModel(stock)(torch.tensor([side]), torch.ones(1, len(side))).logits[0] for side in sides]
    torch.testing.assert_close(torch.stack(alone), scores, rtol=1e-4, atol=1e-4)
    evaluated = evaluate_preferences(run.model, run.tokenizer, PAIRS, max_length_tokens=96, batch_size=2, scores=True)
    assert set(evaluated) == {"preference_accuracy", "preference_margin"}
    assert evaluated["preference_margin"].metric.value == pytest.approx(
        float((scores[::2] - scores[1::2]).mean()), rel=1e-4
    )


def test_log_probabilities_are_summed_over_the_answer(base: Path, tmp_path: Path) -> None:
    run = Run(base, PAIRS, tmp_path, "dpo").randomised()
    prompt, chosen, _ = pair_ids(run.tokenizer, PAIRS[0], 96)
    row = (prompt + chosen, [-100] * len(prompt) + chosen)
    ((ids, labels, mask),) = list(batches([row], 1, torch.device("cpu")))
    with torch.no_grad():
        assert float(answer_logps(run.model.eval(), ids, labels, mask)) == pytest.approx(
            float(logps(run, "chosen", True)[0]), rel=1e-5
        )
    assert reference_kl(run.model, [row]) > 0
