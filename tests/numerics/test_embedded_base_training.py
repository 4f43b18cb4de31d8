"""The parts of the embedded base's pretraining that are easy to get wrong, on tiny tensors and models."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import Llama4ForCausalLM, Llama4TextConfig

from studio.base.pretrain import Schedule, learning_rate_factor, one_document_each
from studio.base.routing import (
    balance_loss,
    coherence_loss,
    expert_counts,
    mutual_information_bits,
    recorded_router_logits,
)
from studio.base.start import start_with_copying

SURE = 50.0


def _tiny(vocab_size: int = 128) -> Llama4ForCausalLM:
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, head_dim=64, num_local_experts=4, pad_token_id=1, bos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, initializer_range=0.03,
    )  # fmt: skip
    return Llama4ForCausalLM(config).eval()


def _choices(experts: list[int], count: int = 4) -> Tensor:
    return SURE * torch.nn.functional.one_hot(torch.tensor(experts), count).float()


def test_balance_is_one_for_even_use_and_the_number_of_experts_when_one_takes_all() -> None:
    assert balance_loss(_choices([0, 1, 2, 3])).item() == pytest.approx(1.0)
    assert balance_loss(_choices([2, 2, 2, 2])).item() == pytest.approx(4.0)


def test_coherence_is_minus_the_information_of_row_and_expert() -> None:
    split, mixed = _choices([0, 0, 1, 1]), _choices([0, 1, 0, 1])
    assert coherence_loss(split, rows=2).item() == pytest.approx(-math.log(2), abs=1e-5)
    assert coherence_loss(mixed, rows=2).item() == pytest.approx(0.0, abs=1e-5)


def test_mutual_information_weighs_domains_alike() -> None:
    assert mutual_information_bits(torch.tensor([[90.0, 0.0], [0.0, 3.0]])) == pytest.approx(1.0, abs=1e-6)
    assert mutual_information_bits(torch.tensor([[90.0, 30.0], [9.0, 3.0]])) == pytest.approx(0.0, abs=1e-6)


def test_expert_counts_add_up() -> None:
    assert expert_counts(_choices([1, 1, 3])).tolist() == [0, 2, 0, 1]


@torch.no_grad()
def test_router_logits_are_recorded_once_per_moe_layer_and_hooks_go_away() -> None:
    model, ids = _tiny(), torch.randint(2, 128, (2, 6))
    with recorded_router_logits(model) as logits:
        model(input_ids=ids)
    assert [tuple(layer.shape) for layer in logits] == [(12, 4)] * 4
    model(input_ids=ids)
    assert len(logits) == 4


@torch.no_grad()
def test_packed_documents_read_as_if_each_stood_alone() -> None:
    model = _tiny()
    documents = [torch.tensor([0, *torch.randint(2, 128, (n,)).tolist()]) for n in (5, 9, 4)]
    packed = torch.cat(documents)[None]
    together = model(input_ids=packed, use_cache=False, **one_document_each(packed)).logits[0]
    alone = torch.cat([model(input_ids=document[None], use_cache=False).logits[0] for document in documents])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def _copied_fraction(prepare: Callable[[Llama4ForCausalLM], None]) -> float:
    """Return how often a model, at the second half of a repeated random sequence, names the next token."""
    model = _tiny()
    prepare(model)
    half = torch.stack([2 + torch.randperm(126)[:12] for _ in range(16)])
    ids = torch.cat([half, half], dim=1)
    with torch.no_grad():
        predicted = model(input_ids=ids, use_cache=False).logits.argmax(-1)
    return float((predicted[:, 12:-1] == ids[:, 13:]).float().mean())


def test_the_starting_weights_copy_and_random_ones_do_not() -> None:
    assert _copied_fraction(lambda model: start_with_copying(model, seed=0)) > 0.8
    assert _copied_fraction(lambda model: None) < 0.2


def test_the_learning_rate_warms_up_peaks_and_ends_low() -> None:
    schedule = Schedule(steps=100, warmup_steps=10)
    factors = [learning_rate_factor(step / 100, schedule) for step in range(100)]
    assert factors[0] < 0.1 and factors[10] == pytest.approx(1.0) and factors[99] < 0.05
    assert factors == sorted(factors[:11]) + sorted(factors[11:], reverse=True)
