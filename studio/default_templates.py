"""Chat templates for checkpoints that have none, by the special tokens that their tokenizer holds.

A base model is often published without a template. What is used then follows the family's own format in its simplest
form, turns of text, as far as its tokens say which format it is. Where no token says so, the turns are named in plain
text and answers end with the tokenizer's EOS.

The formats are those of the published model cards: Llama 3 and 4 (llama.com/docs), ChatML (Qwen), Harmony (gpt-oss),
DeepSeek-V2/V3, Mistral's [INST].
"""

from __future__ import annotations

from dataclasses import dataclass

PLAIN_TEXT_ALONE = "{{- raise_exception('the default template has no form for tool calls') if message['tool_calls'] -}}"


@dataclass(frozen=True)
class Default:
    """One format.

    Attributes:
        tokens: that the tokenizer must hold.
        families: model types that have the format without tokens of its own; () where the tokens say enough.
        template: Jinja, as tokenizers of transformers render it.
    """

    name: str
    tokens: tuple[str, ...]
    families: tuple[str, ...]
    template: str


def _turns(opening: str, middle: str, closing: str, first: str = "{{- bos_token or '' -}}") -> str:
    """A format in which every turn is `opening` role `middle` content `closing`."""
    return (
        f"{first}{{%- for message in messages -%}}{PLAIN_TEXT_ALONE}"
        f"{{{{- '{opening}' + message['role'] + '{middle}' + message['content'] | trim + '{closing}' -}}}}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{- '{opening}assistant{middle}' -}}}}{{%- endif -%}}"
    )


HARMONY = (
    f"{{%- for message in messages -%}}{PLAIN_TEXT_ALONE}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + message['content'] | trim -}}"
    "{{- '<|return|>' if loop.last else '<|end|>' -}}"
    "{%- else -%}"
    "{{- '<|start|>' + message['role'] + '<|message|>' + message['content'] | trim + '<|end|>' -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start|>assistant<|channel|>final<|message|>' -}}{%- endif -%}"
)

DEEPSEEK = (
    f"{{{{- bos_token or '' -}}}}{{%- for message in messages -%}}{PLAIN_TEXT_ALONE}"
    "{%- if message['role'] == 'assistant' -%}{{- '<｜Assistant｜>' + message['content'] | trim + eos_token -}}"
    "{%- elif message['role'] == 'user' -%}{{- '<｜User｜>' + message['content'] | trim -}}"
    "{%- else -%}{{- message['content'] | trim + '\n\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' -}}{%- endif -%}"
)

INSTRUCT = (
    f"{{{{- bos_token or '' -}}}}{{%- for message in messages -%}}{PLAIN_TEXT_ALONE}"
    "{%- if message['role'] == 'assistant' -%}{{- ' ' + message['content'] | trim + eos_token -}}"
    "{%- else -%}{{- '[INST] ' + message['content'] | trim + ' [/INST]' -}}{%- endif -%}{%- endfor -%}"
)

PLAIN = (
    f"{{{{- bos_token or '' -}}}}{{%- for message in messages -%}}{PLAIN_TEXT_ALONE}"
    "{{- message['role'] | capitalize + ': ' + message['content'] | trim -}}"
    "{{- eos_token if message['role'] == 'assistant' else '\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}"
)

DEFAULTS = (
    Default(
        "llama4",
        ("<|header_start|>", "<|header_end|>", "<|eot|>"),
        (),
        _turns("<|header_start|>", r"<|header_end|>\n\n", "<|eot|>"),
    ),
    Default(
        "llama3",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        (),
        _turns("<|start_header_id|>", r"<|end_header_id|>\n\n", "<|eot_id|>"),
    ),
    Default("chatml", ("<|im_start|>", "<|im_end|>"), (), _turns("<|im_start|>", r"\n", r"<|im_end|>\n", "")),
    Default("harmony", ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"), (), HARMONY),
    Default("deepseek", ("<｜User｜>", "<｜Assistant｜>"), (), DEEPSEEK),
    Default("instruct", (), ("mixtral", "mistral"), INSTRUCT),
    Default("plain", (), (), PLAIN),
)
"""In order: the first whose tokens are there, and whose families, if it names any, hold the model."""


def default_template(tokens: frozenset[str], model_type: str) -> str:
    """The template for a tokenizer that holds `tokens` (special and added ones) and a model of this type."""
    return next(
        default.template
        for default in DEFAULTS
        if tokens.issuperset(default.tokens) and (not default.families or model_type in default.families)
    )
