"""The embedded base's tokenizer: byte-level BPE with Llama 4's special tokens and chat format.

Three choices serve copying, which is most of what a small model has to do in an extraction task:
a space joins the following word only when that word starts in lower case, so `Norwick` is the same token after a
space and after a quotation mark; digits come in pairs (`482` → `48`, `2`), so an identifier is a few tokens with few
repeats; every byte is in the vocabulary, so any text round-trips.

The merges are learned within the pieces of `MERGE_PATTERN`, which says all that. Text is then cut by Llama 3's own
pattern, because llama.cpp knows patterns by name and no others: a piece of it may hold several of the finer ones, and
no merge crosses from one to the next.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from studio.base.domains import DOMAINS, Document, documents

BOS, EOS, EOT, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|eot|>", "<|finetune_right_pad|>"
SPECIAL_TOKENS: tuple[str, ...] = (BOS, EOS, "<|header_start|>", "<|header_end|>", "<|eom|>", EOT, "<|step|>", PAD)
"""Placed at ids 0–7. `<|step|>` is Llama 4's too; nothing here writes it."""

VOCAB_SIZE = 1792
MAX_LENGTH_TOKENS = 8192

MERGE_PATTERN = (
    r"\p{N}{1,2}"  # digits in pairs
    r"| ?\p{Ll}+"  # lower-case words take their space along
    r"|\p{Lu}+\p{Ll}*"  # names, months, tags: the same token wherever they stand
    r"| ?[^\s\p{L}\p{N}]+"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    r"|\p{L}+"
)
"""The pieces within which merges are learned."""

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How text is cut before the merges: the pattern of Llama 3 and 3.1 (tokenizer.json), "llama-bpe" in llama.cpp."""

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] | trim -}}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{- part['text'] | trim -}}
{%- endfor -%}
{%- endif -%}
{{- '<|eot|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|header_start|>assistant<|header_end|>\\n\\n' -}}
{%- endif -%}
"""


def chat_messages(document: Document) -> list[dict[str, str]]:
    """Return the turns of a chat document as messages of alternating user and assistant."""
    return [
        {"role": role, "content": content}
        for turn in document.turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


def render(document: Document) -> str:
    """Return a document as the model reads it, special tokens included (the same text as the chat template's)."""
    if not document.turns:
        return f"{BOS}{document.text}{EOS}"
    parts = (f"<|header_start|>{m['role']}<|header_end|>\n\n{m['content']}{EOT}" for m in chat_messages(document))
    return BOS + "".join(parts)


def _corpus(documents_per_domain: int, seed: int) -> Iterator[str]:
    for domain in DOMAINS:
        for document in itertools.islice(documents(domain, seed), documents_per_domain):
            yield document.text or "\n\n".join(m[part] for m in chat_messages(document) for part in ("role", "content"))


def _split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train_tokenizer(seed: int = 0, documents_per_domain: int = 4000) -> PreTrainedTokenizerFast:
    """Train the BPE merges on the pretraining domains; deterministic for a seed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _split_by(MERGE_PATTERN)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(documents_per_domain, seed), trainer)
    tokenizer.pre_tokenizer = _split_by(SPLIT_PATTERN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return _as_fast(tokenizer)


def _as_fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOT,
        pad_token=PAD,
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in (BOS, EOT, PAD)],
        model_max_length=MAX_LENGTH_TOKENS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save_pretrained(directory)
