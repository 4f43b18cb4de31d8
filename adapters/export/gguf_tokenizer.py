"""A tokenizer as GGUF metadata: tokens, merges or scores, special tokens, chat template.

llama.cpp has the regular expressions that split text before BPE compiled in, each under a name; a tokenizer is written
only under the name of just its own expressions. SentencePiece-like tokenizers (Mixtral's) become its "llama" kind, with
scores that put merges in the order of the file. What llama.cpp then makes of text is compared id by id afterwards
(`adapters.verify.gguf_files`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from adapters.chat_template import load_tokenizer
from adapters.checkpoint import read_json_object, text_config
from adapters.errors import ExportError, listed

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What a ByteLevel step of the package tokenizers splits by itself."""

PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    (GPT2,): "gpt-2",
    (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + SPACES,): "llama-bpe",
    (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + SPACES,): "qwen2",
    (WORDS % (CONTRACTIONS + "?", CONTRACTIONS + "?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + SPACES,): "gpt-4o",
    (WORDS % ("", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + SPACES,): "tekken",
    (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
        r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + SPACES,
    ): "deepseek-v3",
}
"""llama.cpp's names (src/llama-vocab.cpp, llm_tokenizer_bpe) of the expressions in published tokenizer.json files."""

ENDS_A_TURN = re.compile(r"eot|end_of_turn|im_end|<\|end\|>|<\|turn", re.IGNORECASE)
WHOLE_WORDS_FIRST = {"llama-bpe": "smaug-bpe", "tekken": None}
"""Names under which llama.cpp takes a word that is a token whole, without merging; and the name that merges."""

KNOWN_ENDS = ("<|end_of_text|>", "<|endoftext|>", "</s>")
"""llama.cpp ends a generation at these by their text."""


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to know of a tokenizer.

    Attributes:
        kind: "gpt2" for BPE over bytes, "llama" for SentencePiece's. pre: name of the splitting expressions.
        tokens: one for each row of the embeddings. types: their `gguf.TokenType`.
        merges: for "gpt2"; scores: for "llama".
        bos, eos, pad, unk: ids or None. ends: every id that ends a generation, by any of the model's files.
        add_bos: whether text gets a BOS in front. add_space: whether it gets a space in front.
        chat_template: its text, or None.
    """

    kind: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    bos: int | None
    eos: int | None
    pad: int | None
    unk: int | None
    ends: tuple[int, ...]
    add_bos: bool
    add_space: bool
    chat_template: str | None

    def write(self, writer: GGUFWriter) -> None:
        """Adds everything to the file's metadata."""
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.kind == "llama":
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.add_space)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, number in self._special_ids().items():
            if number is not None:
                getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)

    def _special_ids(self) -> dict[str, int | None]:
        """EOT is the end of a turn; a further end that llama.cpp does not know by its text is written as EOM."""
        turn = next((number for number in self.ends if ENDS_A_TURN.search(self.tokens[number])), None)
        others = [n for n in self.ends if n not in (turn, self.eos) and self.tokens[n] not in KNOWN_ENDS]
        ids = {"bos": self.bos, "eos": self.eos, "unk": self.unk, "pad": self.pad}
        return {**ids, "eot": turn, "eom": others[0] if others else None}


def read_vocabulary(base: Path, config: Mapping[str, Any], adapter: Path | None = None) -> Vocabulary:
    """The tokenizer of a model directory, as transformers loads it.

    Args:
        adapter: whose own chat template, if it has one, stands for the base's.
        config: the language model's part of config.json.

    Raises:
        ExportError: there is none, it is of a kind that llama.cpp does not have, or it has more tokens than the model.
    """
    if not (base / "tokenizer.json").is_file():
        raise ExportError(f"{base} has no tokenizer.json; GGUF files hold their tokenizer, so it is needed")
    tokenizer = load_tokenizer(base, adapter)
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    model, size = written["model"], config["vocab_size"]
    if model["type"] != "BPE":
        raise ExportError(f"a {model['type']} tokenizer is not written as GGUF; BPE and SentencePiece's BPE are")
    spm = bool(model["byte_fallback"])
    added = dict(tokenizer.added_tokens_decoder)
    tokens = _tokens({**model["vocab"], **{token.content: number for number, token in added.items()}}, size)
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    bare = tokenizer("a", add_special_tokens=False).input_ids
    return Vocabulary(
        kind="llama" if spm else "gpt2",
        pre="default" if spm else _pre(written, tokenizer),
        tokens=[token if token is not None else f"[PAD{number}]" for number, token in enumerate(tokens)],
        types=[_type(number, token, added, model, spm) for number, token in enumerate(tokens)],
        merges=[] if spm else [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges],
        scores=_scores(tokens, merges) if spm else [],
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
        unk=tokenizer.unk_token_id if spm else None,
        ends=generation_ends(base, tokenizer.eos_token_id),
        add_bos=tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id],
        add_space=spm and (tokens[bare[0]] or "").startswith("▁"),
        chat_template=chat_template(tokenizer),
    )


def chat_template(tokenizer: Any) -> str | None:
    """The template's text; of several the one called "default"."""
    found = tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found


def generation_ends(base: Path, eos: int | None) -> tuple[int, ...]:
    """Every id at which generation ends by config.json, generation_config.json or the tokenizer, sorted."""
    files = [base / name for name in ("config.json", "generation_config.json") if (base / name).is_file()]
    said = [text_config(read_json_object(file)).get("eos_token_id") for file in files]
    said += [read_json_object(file).get("eos_token_id") for file in files]
    found = {number for ids in [*said, eos] for number in (ids if isinstance(ids, list) else [ids])}
    return tuple(sorted(number for number in found if number is not None))


def pre_tokenizer_name(written: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer.json splits text before BPE.

    Raises:
        ExportError: llama.cpp has nothing that splits the same way.
    """
    steps = written.get("pre_tokenizer") or {}
    patterns: list[str] = []
    other: list[str] = []
    for step in steps.get("pretokenizers", [steps]):
        if step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append(next(iter(step["pattern"].values())).replace("\r", r"\r").replace("\n", r"\n"))
        elif step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
            patterns += [GPT2] * step.get("use_regex", True)
        else:
            other.append(f"step {step.get('type')!r}")
    name = PRE_TOKENIZERS.get(tuple(patterns))
    if other or name is None:
        known = ", ".join(sorted(PRE_TOKENIZERS.values()))
        found = [*other, *(f"split by {pattern}" for pattern in patterns)]
        title = f"llama.cpp has no pre-tokenizer that splits text as this tokenizer.json does (it has {known})"
        raise ExportError(listed(title, found))
    return name


def _pre(written: Mapping[str, Any], tokenizer: Any) -> str:
    """The name by expressions and by `ignore_merges`, which matters only where merges do not reach every token."""
    name, whole = pre_tokenizer_name(written), bool(written["model"].get("ignore_merges"))
    if whole == (name in WHOLE_WORDS_FIRST):
        return name
    model = tokenizer.backend_tokenizer.model
    if all(len(model.tokenize(token)) == 1 for token in written["model"]["vocab"]):
        return name
    other = WHOLE_WORDS_FIRST.get(name)
    if other is None:
        raise ExportError(f"llama.cpp's pre-tokenizer {name!r} does not have this tokenizer's ignore_merges = {whole}")
    return other


def _tokens(vocab: Mapping[str, int], size: int) -> list[str | None]:
    """Tokens by id, None where the embeddings have a row that no token has."""
    if vocab and max(vocab.values()) >= size:
        raise ExportError(f"the tokenizer has the id {max(vocab.values())}, the model only {size} embeddings")
    tokens: list[str | None] = [None] * size
    for token, number in vocab.items():
        tokens[number] = token
    return tokens


def _type(number: int, token: str | None, added: Mapping[int, Any], model: Mapping[str, Any], spm: bool) -> int:
    if token is None:
        return int(TokenType.UNUSED)
    if spm and token == model.get("unk_token"):
        return int(TokenType.UNKNOWN)
    if number in added:
        control = added[number].special or (token.startswith("<|") and token.endswith("|>"))
        return int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
    return int(TokenType.BYTE if spm and re.fullmatch(r"<0x[0-9A-F]{2}>", token) else TokenType.NORMAL)


def _scores(tokens: list[str | None], merges: list[list[str]]) -> list[float]:
    """Higher is merged first: minus the place of the first merge that makes the token."""
    places: dict[str, int] = {}
    for place, pair in enumerate(merges):
        places.setdefault("".join(pair), place)
    return [-float(places.get(token or "", len(merges))) for token in tokens]
