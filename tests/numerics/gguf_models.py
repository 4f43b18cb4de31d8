"""Tiny models for the GGUF tests, the same to the last bit on every machine.

Every weight is a small multiple of a power of two, drawn as an integer, so no instruction set rounds it otherwise; the
adapter's factors have so few bits that its products are exact too. The tokenizers are written out by hand.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER, _SHORT = (
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
)
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
WORDS = "the and for ing ed es er on in at ticket order refund please printer on.\n 12 Ü ß"
SPECIALS = BOS, END, TURN, PAD = ("<|begin|>", "<|end|>", "<|turn|>", "<|endoftext|>")
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|turn|>{% endfor %}"
GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


@dataclass(frozen=True)
class GgufModel:
    """One tiny model: a family, the keys of its config that matter here, and its tokenizer's pattern."""

    family: str
    options: dict[str, Any]
    hidden: int = 256
    pattern: str | tuple[str, ...] | None = LLAMA3

    def config(self, ids: dict[str, int]) -> dict[str, Any]:
        bos, turn, pad = (
            ids[token] for token in (("<s>", "</s>", "</s>") if self.pattern is None else (BOS, TURN, PAD))
        )
        tokens = {"bos_token_id": bos, "eos_token_id": turn, "pad_token_id": pad, "vocab_size": len(ids)}
        return {"hidden_size": self.hidden, "max_position_embeddings": 512, **tokens, **self.options}

    def save(self, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
        """A model directory as published: weights under the files' own names, config, tokenizer, chat template."""
        directory.mkdir(parents=True)
        tokenizer = spm_tokenizer() if self.pattern is None else bpe_tokenizer(self.pattern)
        save_tokenizer(tokenizer, directory)
        ids = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        config = AutoConfig.for_model(self.family, **self.config(ids))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model = model.to_empty(device="cpu").to(dtype)
        model.tie_weights()
        for name, tensor in (*model.named_parameters(), *corrections(model)):
            tensor.data = drawn(name, tuple(tensor.shape), 1.0 if name.endswith("norm.weight") else 0.0).to(dtype)
        model.save_pretrained(directory)
        return directory


def corrections(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]


def drawn(name: str, shape: tuple[int, ...], mean: float = 0.0) -> Tensor:
    """Uniform in ±1/8 round the mean, in steps of 2^-13."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return mean + torch.randint(-1024, 1025, shape, generator=generator).float() * 2.0**-13


def byte_letters() -> dict[int, str]:
    """GPT-2's letters for the 256 bytes (openai/gpt-2, encoder.py: bytes_to_unicode)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}


def merges_of(words: list[list[str]], vocab: dict[str, int]) -> list[list[str]]:
    """Merges that build each word from the left; new tokens are added to the vocabulary."""
    merges: list[list[str]] = []
    for pieces in words:
        left = pieces[0]
        for right in pieces[1:]:
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append([left, right])
            left += right
    return merges


def bpe_tokenizer(pattern: str | tuple[str, ...]) -> dict[str, Any]:
    letters = byte_letters()
    vocab = {letters[byte]: byte for byte in range(256)}
    words = [[letters[byte] for byte in text.encode()] for word in WORDS.split(" ") for text in (word, " " + word)]
    merges = merges_of(words, vocab)
    patterns = (pattern,) if isinstance(pattern, str) else pattern
    splits = [
        {"type": "Split", "pattern": {"Regex": found}, "behavior": "Isolated", "invert": False} for found in patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps = [*splits, byte_level] if pattern != "gpt2" else [{**byte_level, "use_regex": True}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special(number, content) for number, content in enumerate(SPECIALS, len(vocab))],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": starting_with(BOS, len(vocab)),
        "decoder": byte_level,
        "model": bpe_model(vocab, merges),
    }


def spm_tokenizer() -> dict[str, Any]:
    """As Llama 2's and Mixtral's tokenizer.json: BPE over characters, ▁ for spaces, bytes for what is left."""
    vocab = {token: number for number, token in enumerate(("<unk>", "<s>", "</s>"))}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for letter in dict.fromkeys(WORDS.replace(" ", "▁").replace("\n", "") + "ABCxyz!?,0345"):
        vocab[letter] = len(vocab)
    for word in (text for plain in WORDS.split() if plain.isalpha() for text in (plain, "▁" + plain)):
        for end in range(2, len(word) + 1):
            vocab.setdefault(word[:end], len(vocab))
    merges = [[new[:cut], new[cut:]] for new in vocab for cut in range(1, len(new)) if splits(new, cut, vocab)]
    rename = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [
        {**rename, "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        strip,
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special(number, content) for number, content in enumerate(("<unk>", "<s>", "</s>"))],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, rename]},
        "pre_tokenizer": None,
        "post_processor": starting_with("<s>", 1),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {**bpe_model(vocab, merges), "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True},
    }


def splits(token: str, cut: int, vocab: dict[str, int]) -> bool:
    """Whether both halves are tokens: SentencePiece merges any two tokens that make a third."""
    return not token.startswith("<") and token[:cut] in vocab and token[cut:] in vocab


def bpe_model(vocab: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    off = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **off, **flags, "vocab": vocab, "merges": merges}


def special(number: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": True}


def starting_with(content: str, number: int) -> dict[str, Any]:
    first = {"SpecialToken": {"id": content, "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, sequence],
        "pair": [first, sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {content: {"id": content, "ids": [number], "tokens": [content]}},
    }


def save_tokenizer(tokenizer: dict[str, Any], directory: Path) -> None:
    names = (BOS, TURN, PAD)
    if tokenizer["model"]["byte_fallback"]:
        names = ("<s>", "</s>", "</s>")
    config = {
        **dict(zip(("bos_token", "eos_token", "pad_token"), names, strict=True)),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


def moe(experts: str, width: str, layers: int = 2, count: int = 8, size: int = 256, **more: Any) -> dict[str, Any]:
    return {**GQA, "num_hidden_layers": layers, experts: count, "num_experts_per_tok": 2, width: size, **more}


MODELS: dict[str, GgufModel] = {
    "llama4": GgufModel(
        "llama4_text",
        moe(
            "num_local_experts",
            "intermediate_size",
            layers=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            intermediate_size_mlp=512,
        ),
        pattern=GPT4O,
    ),
    "mixtral": GgufModel("mixtral", moe("num_local_experts", "intermediate_size"), pattern=None),
    "qwen3_moe": GgufModel(
        "qwen3_moe",
        moe("num_experts", "moe_intermediate_size", layers=3, count=6, intermediate_size=512, norm_topk_prob=True),
        pattern=QWEN2,
    ),
    "olmoe": GgufModel(
        "olmoe", moe("num_experts", "intermediate_size", count=6, size=96, num_key_value_heads=4), pattern="gpt2"
    ),
    "deepseek_v3": GgufModel(
        "deepseek_v3",
        {
            **moe("n_routed_experts", "moe_intermediate_size", layers=3, intermediate_size=512),
            "head_dim": 32,
            "num_key_value_heads": 4,
            "q_lora_rank": 64,
            "kv_lora_rank": 256,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
        },
        pattern=DEEPSEEK,
    ),
    "gpt_oss": GgufModel("gpt_oss", moe("num_local_experts", "intermediate_size", sliding_window=64), pattern=GPT4O),
    "llama": GgufModel(
        "llama",
        {
            **GQA,
            "num_hidden_layers": 9,
            "intermediate_size": 272,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen2": GgufModel(
        "qwen2",
        {
            **GQA,
            "num_hidden_layers": 2,
            "intermediate_size": 512,
            "tie_word_embeddings": True,
            "num_key_value_heads": 1,
        },
        pattern=QWEN2,
    ),
    "qwen3": GgufModel("qwen3", {**GQA, "num_hidden_layers": 2, "intermediate_size": 512}, pattern=QWEN2),
}
