"""The score of each row against stock's own loss on it, one row at a time."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoTokenizer, Llama4ForCausalLM

from studio import scoring
from studio.base import EMBEDDED_DIR
from studio.data import Example, Message, PlainText, Row
from studio.data.rows import Labelled, Preference
from studio.encoding import encode
from studio.evaluation import held_out_loss
from studio.scoring import row_losses

EXAMPLES = [
    Example((Message("user", f"Pump {n} leaks. {'Really. ' * n}"),), (Message("assistant", f"ok {n} " * n),))
    for n in range(1, 8)
]
ROWS: list[Row] = [*EXAMPLES[:4], PlainText("Plain text about a pump in the hall."), *EXAMPLES[4:]]


@pytest.fixture(scope="module")
def tools() -> tuple[Llama4ForCausalLM, object]:
    model = Llama4ForCausalLM.from_pretrained(EMBEDDED_DIR, dtype=torch.float64).eval()
    return model, AutoTokenizer.from_pretrained(EMBEDDED_DIR)


def stock_loss(tools, row) -> float:
    """By transformers' own loss in float64, which averages over the learned tokens of the one row."""
    ids, labels = (torch.tensor([part]) for part in encode(tools[1], row, 256))
    with torch.no_grad():
        logits = tools[0](input_ids=ids).logits.double()
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100))


def test_each_score_is_stocks_loss_on_that_row_alone(tools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "LOGITS_CHUNK_TOKENS", 7)
    wanted = [stock_loss(tools, row) for row in ROWS]
    assert len(set(wanted)) == len(wanted)
    for batch_tokens in (1, 150, 10_000):
        assert row_losses(*tools, ROWS, 256, batch_tokens=batch_tokens) == pytest.approx(wanted, rel=1e-6)


def test_scores_weighted_by_tokens_are_the_held_out_loss(tools) -> None:
    counts = [sum(label != -100 for label in encode(tools[1], example, 256)[1][1:]) for example in EXAMPLES]
    scores = row_losses(*tools, EXAMPLES, 256)
    mean = sum(score * count for score, count in zip(scores, counts, strict=True)) / sum(counts)
    assert held_out_loss(*tools, EXAMPLES, max_length_tokens=256, batch_size=4) == pytest.approx(mean, rel=1e-6)


def test_the_side_that_is_scored_is_the_wanted_one(tools) -> None:
    prompt, good, bad = EXAMPLES[0].prompt, EXAMPLES[0].completion, EXAMPLES[1].completion
    rows: list[Row] = [Preference(prompt, good, bad), Labelled(prompt, good, True), Labelled(prompt, bad, False)]
    wanted = [stock_loss(tools, Example(prompt, side)) for side in (good, good, bad)]
    assert row_losses(*tools, rows, 256) == pytest.approx(wanted, rel=1e-6)


def test_a_row_whose_answer_is_cut_off_has_no_score(tools) -> None:
    done: list[tuple[int, int]] = []
    scores = row_losses(*tools, EXAMPLES[:3], 12, progress=lambda n, total: done.append((n, total)))
    assert all(map(math.isnan, scores)) and done[-1] == (3, 3)
