"""Held-out loss against stock's own loss, and exact match against what the model is known to say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GraniteMoeConfig, GraniteMoeForCausalLM, Llama4ForCausalLM

from studio import evaluation
from studio.base import EMBEDDED_DIR
from studio.data import Example, Message, PlainText
from studio.data.rows import as_turns
from studio.encoding import LossOn, encode
from studio.evaluation import evaluate, held_out_loss
from studio.measuring import Measuring
from studio.recipe import parse_recipe

EXAMPLES = [
    Example(
        (Message("user", f"Pump PMP-{n:04d} at Norwick leaks. {'Really. ' * n}"),), (Message("assistant", f"ok {n}"),)
    )
    for n in range(1, 7)
]


@pytest.fixture(scope="module")
def tools() -> tuple[Llama4ForCausalLM, object]:
    model = Llama4ForCausalLM.from_pretrained(EMBEDDED_DIR, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(EMBEDDED_DIR)


def run(tools, examples=EXAMPLES, batch_size: int = 4) -> evaluation.Evaluation:
    return evaluate(*tools, examples, max_length_tokens=256, max_new_tokens=12, batch_size=batch_size)


def test_loss_is_the_mean_of_stocks_loss_over_completion_tokens(tools, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tools
    summed = count = 0.0
    for example in EXAMPLES:
        ids, labels = (torch.tensor([part]) for part in encode(tokenizer, example, 256))
        learned = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            summed += model(input_ids=ids, labels=labels).loss.item() * learned
        count += learned
    monkeypatch.setattr(evaluation, "LOGITS_CHUNK_TOKENS", 5)
    assert run(tools).loss == pytest.approx(summed / count, rel=1e-5)


TURNS = [
    Example(
        (
            Message("system", "Be brief."),
            Message("user", f"Hello {n}"),
            Message("assistant", f"Hello, what about {n}", learned=n > 1),
            Message("user", f"It leaks. {'Really. ' * n}"),
        ),
        (Message("assistant", f"ticket {n}"),),
    )
    for n in range(1, 5)
]


@pytest.mark.parametrize("loss_on", ["completion", "assistant", "all"])
def test_the_loss_is_over_the_tokens_that_training_learns(tools, loss_on: LossOn) -> None:
    """By a slow loop over the texts that the template writes for each turn, token by token."""
    model, tokenizer = tools
    summed = count = 0.0
    for example in [*TURNS, PlainText("The old fox walked to the river.")]:
        parts = _parts(tokenizer, example, loss_on)
        ids = torch.tensor([[token for part, _ in parts for token in part]])
        learned = [place for place, (_, is_learned) in enumerate(_flat(parts)) if is_learned and place]
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
        summed -= sum(float(logps[place - 1, ids[0, place]]) for place in learned)
        count += len(learned)
    rows = [*TURNS, PlainText("The old fox walked to the river.")]
    settings = {"max_length_tokens": 256, "batch_size": 2, "loss_on": loss_on}
    assert held_out_loss(*tools, rows, **settings) == pytest.approx(summed / count, rel=1e-5)
    assert evaluate(*tools, rows, max_new_tokens=2, **settings).loss == pytest.approx(summed / count, rel=1e-5)


def test_what_a_job_measures_is_what_it_trains(tools) -> None:
    losses = []
    for loss_on in ("completion", "all"):
        text = f"data: {{train: x, max_length_tokens: 256}}\ntraining: {{loss_on: {loss_on}}}\noutput: {{dir: y}}\n"
        recipe = parse_recipe(text + "evaluation: {max_new_tokens: 2}\n")
        losses.append(Measuring(recipe, TURNS).run(*tools).loss)
        settings = {"max_length_tokens": 256, "batch_size": 8, "loss_on": loss_on}
        assert losses[-1] == pytest.approx(held_out_loss(*tools, TURNS, **settings), rel=1e-6)
    assert losses[0] != pytest.approx(losses[1], rel=0.01)


def _parts(tokenizer: Any, row: Any, loss_on: str) -> list[tuple[list[int], bool]]:
    """Tokens of each piece of a row's text, and whether they are learned."""
    if isinstance(row, PlainText):
        return [([*tokenizer(row.text).input_ids, tokenizer.eos_token_id], True)]
    parts: list[tuple[list[int], bool]] = []
    written = ""
    for number, turn in enumerate(row.turns):
        before = as_turns(row.turns[:number])
        if turn.role == "assistant":
            asked = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
            parts.append((_ids(tokenizer, asked.removeprefix(written)), loss_on == "all"))
            written = asked
        whole = tokenizer.apply_chat_template(as_turns(row.turns[: number + 1]), tokenize=False)
        last = number == len(row.turns) - 1
        learned = loss_on == "all" or (turn.role == "assistant" and ((loss_on == "assistant" and turn.learned) or last))
        parts.append((_ids(tokenizer, whole.removeprefix(written)), learned))
        written = whole
    return parts


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _flat(parts: list[tuple[list[int], bool]]) -> list[tuple[int, bool]]:
    return [(token, learned) for part, learned in parts for token in part]


def test_the_loss_of_a_family_that_scales_its_logits_is_stocks(tools) -> None:
    """GraniteMoE divides them by a number of its config, 6 in the published models."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tools[1]), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    scaled = GraniteMoeConfig(**sizes, **heads, logits_scaling=6.0, initializer_range=1.0, pad_token_id=0)
    model, (ids, labels) = GraniteMoeForCausalLM(scaled).eval(), encode(tools[1], EXAMPLES[0], 256)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
    assert held_out_loss(model, tools[1], EXAMPLES[:1], max_length_tokens=256, batch_size=1) == pytest.approx(wanted)


def test_the_prompt_is_masked_and_the_end_of_turn_is_learned(tools) -> None:
    _, tokenizer = tools
    ids, labels = encode(tokenizer, EXAMPLES[0], 256)
    learned = tokenizer.decode([token for token in labels if token != -100])
    assert learned == "ok 1<|eot|>"
    assert len(ids) == len(labels)


def test_answers_do_not_depend_on_the_batch_they_are_generated_in(tools) -> None:
    assert run(tools, batch_size=1).answers == run(tools, batch_size=6).answers


def test_exact_match_counts_answers_equal_to_the_reference(tools) -> None:
    said = run(tools).answers
    told = [Example(e.prompt, (Message("assistant", text or "x"),)) for e, text in zip(EXAMPLES, said, strict=True)]
    assert run(tools, told[:3] + EXAMPLES[3:]).exact_match == sum(map(bool, said[:3])) / 6


def test_a_model_in_training_mode_is_left_in_training_mode(tools) -> None:
    model, _ = tools
    model.train()
    run(tools, EXAMPLES[:1])
    assert model.training
    model.eval()


def test_what_the_template_puts_before_an_answer_belongs_to_the_reference(tools) -> None:
    model, tokenizer = tools
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template.replace("{{- message['content'] |", "{{- 'Well, ' + message['content'] |")
        assert tokenizer.chat_template != template
        assert run((model, tokenizer), EXAMPLES[:1]).references == ("Well, ok 1",)
    finally:
        tokenizer.chat_template = template


def test_every_example_is_reported(tools, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    options = {"max_length_tokens": 256, "max_new_tokens": 2, "batch_size": 4}
    evaluate(*tools, EXAMPLES, progress=lambda done, total: seen.append((done, total)), **options)
    assert seen[-1] == (12, 12) and seen == sorted(seen)
