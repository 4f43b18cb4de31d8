"""Held-out loss against stock's own loss, and exact match against what the model is known to say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GraniteMoeConfig, GraniteMoeForCausalLM, Llama4ForCausalLM

from studio import evaluation
from studio.base import EMBEDDED_DIR
from studio.data import Example, Message
from studio.encoding import encode
from studio.evaluation import evaluate, held_out_loss

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
