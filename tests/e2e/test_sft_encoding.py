"""The labels that reach the loss are those of studio.encoding; packed examples are computed as if they were alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.data import Example, Message, PlainText
from studio.encoding import encode
from studio.errors import RecipeError
from studio.evaluation import decoder_and_head
from studio.packed_plan import check_packing, packed_rows
from studio.plan import recipe_base
from tests.e2e.conftest import build_base
from tests.e2e.runs import Run

FAMILIES = ("llama4_text", "qwen3_moe")


def conversation(n: int) -> Example:
    early = (Message("user", f"Hello {n}."), Message("assistant", f"Hello, what about {n}?"))
    return Example((*early, Message("user", "It leaks. " * n)), (Message("assistant", f"ticket {n}"),))


ROWS = [*(conversation(n) for n in range(1, 6)), PlainText("The old fox walked to the river. " * 3)]


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(request.param, tmp_path_factory.mktemp(request.param) / "base")


def batches(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    return list(run.trainer(monkeypatch).get_train_dataloader())


def learned(ids: list[int], labels: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What of an example can be learned: nothing predicts its first token."""
    return tuple(ids), (-100, *labels[1:])


@pytest.mark.parametrize("loss_on", ["completion", "assistant", "all"])
def test_the_labels_in_the_batches_are_those_of_encode(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss_on: str
) -> None:
    run = Run(base, ROWS, tmp_path, training={"loss_on": loss_on})
    expected = {learned(*encode(run.tokenizer, row, 96, loss_on)) for row in ROWS}
    found = set()
    for batch in batches(run, monkeypatch):
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            real = int(mask.sum())
            assert labels[real:].eq(-100).all()
            found.add(learned(ids[:real].tolist(), labels[:real].tolist()))
    assert found == expected
    if loss_on == "assistant":
        kept = [sum(label != -100 for label in labels) for _, labels in expected]
        only = [sum(x != -100 for x in encode(run.tokenizer, row, 96, "completion")[1][1:]) for row in ROWS]
        assert sum(kept) > sum(only)  # the earlier turn is learned too


def test_packed_labels_are_those_of_encode_and_every_example_is_there_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(base, ROWS, tmp_path, trl={"packing": True}, training={"loss_on": "assistant"})
    found = []
    for batch in batches(run, monkeypatch):
        assert "attention_mask" not in batch
        for row in range(len(batch["input_ids"])):
            real = int(batch["real_tokens"][row].sum())
            assert batch["labels"][row, real:].eq(-100).all()
            starts = [*batch["position_ids"][row, :real].eq(0).nonzero().flatten().tolist(), real]
            for start, end in pairwise(starts):
                part = (batch[name][row, start:end].tolist() for name in ("input_ids", "labels"))
                found.append(tuple(map(tuple, part)))
    expected = [learned(*encode(run.tokenizer, row, 96, "assistant")) for row in ROWS]
    assert sorted(found) == sorted(expected)
    lengths = [len(ids) for ids, _ in expected]
    rows = sum(len(batch["input_ids"]) for batch in batches(run, monkeypatch))
    assert rows == packed_rows(lengths, 96) < len(ROWS)


def test_packed_examples_have_the_loss_that_they_have_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(base, ROWS, tmp_path, trl={"packing": True}, training={"batch_size": 6}).randomised()
    trainer = run.trainer(monkeypatch)
    (batch,) = list(trainer.get_train_dataloader())
    assert len(batch["input_ids"]) < len(ROWS)
    packed = token_losses(run.model, batch["input_ids"], batch["labels"], position_ids=batch["position_ids"])
    alone: list[float] = []
    for row in ROWS:
        ids, labels = (torch.tensor([part]) for part in encode(run.tokenizer, row, 96))
        alone += token_losses(run.model, ids, labels)
    assert len(packed) == len(alone) > 20
    torch.testing.assert_close(torch.tensor(sorted(packed)), torch.tensor(sorted(alone)), rtol=1e-4, atol=1e-5)
    loss = trainer.compute_loss(run.model, dict(batch))
    assert float(loss) == pytest.approx(sum(alone) / len(alone), rel=1e-4)
    leaking = token_losses(run.model, batch["input_ids"], batch["labels"])  # the same rows without their positions
    difference = torch.tensor(sorted(leaking)) - torch.tensor(sorted(alone))
    assert difference.abs().max() > 1e-3


def token_losses(model: Any, ids: torch.Tensor, labels: torch.Tensor, **inputs: torch.Tensor) -> list[float]:
    decoder, head = decoder_and_head(model.eval())
    with torch.no_grad():
        logits = head(decoder(input_ids=ids, use_cache=False, **inputs).last_hidden_state[:, :-1]).float()
    kept = labels[:, 1:] != -100
    losses: list[float] = torch.nn.functional.cross_entropy(
        logits[kept], labels[:, 1:][kept], reduction="none"
    ).tolist()
    return losses


def test_a_packed_training_counts_its_tokens_and_its_routing_without_padding(base: Path, tmp_path: Path) -> None:
    options = {"packing": True, "neftune_noise_alpha": 5}
    run = Run(base, ROWS, tmp_path, trl=options, training={"batch_size": 6, "max_steps": 1}).train()
    tokens = sum(len(encode(run.tokenizer, row, 96)[0]) for row in ROWS)
    assert run.job.of("router")[0]["tokens"] == tokens


def test_neftune_changes_the_training_loss_and_packing_that_would_leak_is_refused(base: Path, tmp_path: Path) -> None:
    losses = []
    for number, alpha in enumerate((None, 50)):
        run = Run(base, ROWS, tmp_path / str(number), trl={"neftune_noise_alpha": alpha}, training={"batch_size": 6})
        losses.append(run.train().job.of("train")[0]["loss"])
    assert abs(losses[0] - losses[1]) > 1e-3
    if "llama4" in str(base):
        packed = Run(base, ROWS, tmp_path, trl={"packing": True}, data={"train": "x", "max_length_tokens": 8192})
        with pytest.raises(RecipeError, match="scales attention by the place in the row from 8192"):
            check_packing(packed.recipe, recipe_base(packed.recipe))
