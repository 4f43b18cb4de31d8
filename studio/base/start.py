"""The weights a pretraining run starts from: random, except for one circuit that copies.

A small model finds "what followed this token last time?" (an induction head, arXiv 2209.11895) late or not at all
within the few million tokens of this run, and every extraction task rests on it. So the run starts with the circuit
in place, in the manner of mimetic initialisation (arXiv 2305.09828), and trains all of it on:

    embeddings   a few dimensions are the same for every token, which gives attention something constant to hold
    layer 0      the heads look one token back, and add what stood there in a rotated copy R
    last layer   the heads match R(what stood before a token) with the current token, and pass the token on
    lm_head      starts as the embeddings, scaled, so that a token passed on is a token predicted
"""

import torch
from torch import Tensor
from transformers import Llama4ForCausalLM
from transformers.models.llama4.modeling_llama4 import Llama4TextAttention

CONSTANT_DIMS = 8
EMBEDDING_STD = 0.5
HEAD_STD = 0.03
BLOCK_SCALE = 0.1
"""Factor on every other output projection, so that random blocks do not drown the embeddings at first."""

MATCH_GAIN = 2.0
COPY_GAIN = 3.0
LOOK_BACK_AMPLITUDES = (0.5, 0.3, 0.2)
"""Weights of the three fastest rotary frequencies: slower ones cannot tell neighbours apart."""


@torch.no_grad()
def start_with_copying(model: Llama4ForCausalLM, seed: int) -> None:
    """Set the starting weights of `model` in place; deterministic for a seed."""
    generator = torch.Generator().manual_seed(seed)
    layers, hidden = model.model.layers, model.config.hidden_size
    embeddings = model.model.embed_tokens.weight
    embeddings.normal_(0.0, EMBEDDING_STD, generator=generator)
    embeddings[:, :CONSTANT_DIMS] = EMBEDDING_STD
    model.lm_head.weight.copy_(embeddings * (HEAD_STD / EMBEDDING_STD))
    model.lm_head.weight[:, :CONSTANT_DIMS] = 0.0
    for layer in layers:
        layer.self_attn.o_proj.weight.mul_(BLOCK_SCALE)
        layer.feed_forward.shared_expert.down_proj.weight.mul_(BLOCK_SCALE)
        layer.feed_forward.experts.down_proj.mul_(BLOCK_SCALE)

    read, rotation, write = (_orthogonal(hidden, generator) for _ in range(3))
    _look_back(layers[0].self_attn, rotation, model.model.rotary_emb.inv_freq)
    _match_and_copy(layers[-1].self_attn, read, rotation, write)


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    matrix = torch.nn.init.orthogonal_(torch.empty(size, size), generator=generator)
    matrix[:, :CONSTANT_DIMS] = 0.0  # reads no constant
    return matrix


def _look_back(attention: Llama4TextAttention, rotation: Tensor, inv_freq: Tensor) -> None:
    """Make every head attend to the token before: rotary scores peak where key and query differ by one position."""
    size, heads = attention.head_dim, attention.num_attention_heads
    query, key = torch.zeros(size), torch.zeros(size)
    for pair, amplitude in enumerate(LOOK_BACK_AMPLITUDES):
        angle = -inv_freq[pair]
        query[2 * pair], query[2 * pair + 1] = amplitude**0.5 * angle.cos(), amplitude**0.5 * angle.sin()
        key[2 * pair] = amplitude**0.5
    for weight, vector in ((attention.q_proj.weight, query), (attention.k_proj.weight, key)):
        weight.mul_(BLOCK_SCALE)
        weight[:, :CONSTANT_DIMS] = vector.repeat(heads)[:, None]
    attention.v_proj.weight.copy_(rotation)
    attention.o_proj.weight.copy_(torch.eye(len(rotation)) * EMBEDDING_STD)


def _match_and_copy(attention: Llama4TextAttention, read: Tensor, rotation: Tensor, write: Tensor) -> None:
    """Make every head find the token that stood after an earlier copy of the current one, and pass it on."""
    attention.q_proj.weight.copy_(read * MATCH_GAIN)
    attention.k_proj.weight.copy_(read @ rotation.T * MATCH_GAIN)
    attention.v_proj.weight.copy_(write)
    attention.o_proj.weight.copy_(write.T * EMBEDDING_STD * COPY_GAIN)
