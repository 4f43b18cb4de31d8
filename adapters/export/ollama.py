"""Ollama's Modelfile for a GGUF: its chat template in Go's template language, stop strings and parameters.

Ollama does not run the model's own Jinja template. What that template writes between two messages is found out by
rendering it, and said again in Go's language; a template that says more than that gets no TEMPLATE line.

Modelfile: github.com/ollama/ollama, docs/modelfile.md and parser/parser.go; templates: template/template.go.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.chat_template import load_tokenizer
from adapters.checkpoint import read_config, read_json_object, text_config
from adapters.errors import ExportError

MODELFILE = "Modelfile"
MOST_CONTEXT = 8192
"""Ollama reserves memory for the whole context when it loads a model; whoever wants more raises num_ctx."""

Message = dict[str, str]
Render = Callable[[Sequence[Message], bool], str]
"""A chat template: messages, and whether an answer is to follow, → text."""

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
RENAMED = {"repetition_penalty": "repeat_penalty"}
ROLES = ("system", "user", "assistant")
CONVERSATIONS = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
)
"""The roles of the conversations that a template is tried on."""

Joints = Mapping[tuple[str, str], str]
"""What a template writes between the messages of two roles; "" stands for the beginning and for the answer to come."""


def conversation(roles: Sequence[str]) -> list[Message]:
    """Messages of these roles, each with words that no template has."""
    return [{"role": role, "content": f"Zq{number}x {role[:2].upper()}yK"} for number, role in enumerate(roles)]


def chat_template(base: Path, adapter: Path | None = None) -> tuple[Render | None, str]:
    """The model's own template, as stock transformers renders it, and the text of its BOS token ("" for none).

    An adapter's own template stands for the base's. None where neither has one, and for one that writes the day's
    date.
    """
    tokenizer = load_tokenizer(base, adapter)
    text = tokenizer.chat_template
    if not isinstance(text, str) or "strftime_now" in text:
        return None, tokenizer.bos_token or ""

    def render(messages: Sequence[Message], answer: bool) -> str:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer))

    return render, tokenizer.bos_token or ""


def find_joints(render: Render) -> Joints | None:
    """What the template writes between two messages; None where it says more than that, of reasoning for instance.

    White space around a message, which some templates take away, stays.
    """
    joints: dict[tuple[str, str], str] = {}
    for roles in CONVERSATIONS:
        found = _between(render, roles)
        if found is None and "system" in roles:
            continue  # a template may refuse system messages
        if found is None or any(joints.setdefault(pair, text) != text for pair, text in found):
            return None
    return joints if all(_can_be_written(text) for text in joints.values()) else None


def _between(render: Render, roles: Sequence[str]) -> list[tuple[tuple[str, str], str]] | None:
    from jinja2 import TemplateError

    messages = conversation(roles)
    try:
        rest = render(messages, True)
    except TemplateError:
        return None
    found, before = [], ""
    for message in messages:
        if rest.count(message["content"]) != 1:
            return None
        text, rest = rest.split(message["content"])
        found.append(((before, message["role"]), text))
        before = message["role"]
    return [*found, ((before, ""), rest)]


def _can_be_written(text: str) -> bool:
    """A Modelfile drops what cannot be printed, and ends a text at three quotes."""
    return '"""' not in text and all(c.isprintable() or c in "\n\t" for c in text)


def go_template(joints: Joints, bos: str) -> str:
    """The joints in Go's template language, on one line: a marker that trims white space would trim the template's.

    Args:
        bos: left out at the beginning, where Ollama adds it itself.
    """
    branches = ""
    for role in sorted({new for _, new in joints if new}, key=ROLES.index):
        before = {old: text for (old, new), text in joints.items() if new == role}
        start = "{{ else if" if branches else "{{ if"
        branches += f'{start} eq .Role "{role}" }}}}{_choice(before, bos)}{{{{ .Content }}}}'
    return (
        '{{ $last := "" }}{{ range .Messages }}'
        f"{branches}{{{{ end }}}}{{{{ $last = .Role }}}}{{{{ end }}}}"
        f'{{{{ if eq $last "user" }}}}{_literal(joints["user", ""])}{{{{ end }}}}'
    )


def _choice(before: Mapping[str, str], bos: str) -> str:
    """The text that stands before a message, by the role of the message before it."""
    texts = {old: _literal(text.removeprefix(bos) if old == "" else text) for old, text in before.items()}
    if len(texts) == 1:
        return next(iter(texts.values()))
    *others, last = texts.items()
    parts = [
        f'{{{{ {"else " if number else ""}if eq $last "{old}" }}}}{text}' for number, (old, text) in enumerate(others)
    ]
    return f"{''.join(parts)}{{{{ else }}}}{last[1]}{{{{ end }}}}"


def _literal(text: str) -> str:
    """Text outside the actions; braces that would open an action stand as a string in one."""
    return text.replace("{{", '{{ "{{" }}') if "{{" in text else text


def stop_strings(base: Path) -> list[str]:
    """The text of every token that ends an answer, by config.json, generation_config.json or the tokenizer."""
    ids = _eos_ids(base)
    table = read_json_object(base / "tokenizer.json") if (base / "tokenizer.json").is_file() else {}
    texts = {token["id"]: token["content"] for token in table.get("added_tokens", ())}
    own = _tokenizer_eos(base)
    ids += [number for number, text in texts.items() if text == own and number not in ids]
    vocabulary = table.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, Mapping):
        texts = {number: text for text, number in vocabulary.items() if number in ids} | texts
    return [texts[number] for number in ids if number in texts]


def _eos_ids(base: Path) -> list[int]:
    found: list[int] = []
    for config in (text_config(read_config(base)), _generation(base)):
        ids = config.get("eos_token_id")
        found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    return list(dict.fromkeys(found))


def _tokenizer_eos(base: Path) -> str | None:
    file = base / "tokenizer_config.json"
    token = read_json_object(file).get("eos_token") if file.is_file() else None
    return token.get("content") if isinstance(token, Mapping) else token


def _generation(base: Path) -> dict[str, Any]:
    file = base / "generation_config.json"
    return read_json_object(file) if file.is_file() else {}


def modelfile(base: Path, gguf: str, template: str | None) -> str:
    """The text of the Modelfile.

    Args:
        gguf: the name of the file beside it.
        template: in Go's language; None leaves it to Ollama, which knows some templates by their Jinja text.

    Raises:
        ExportError: a stop string that a Modelfile cannot hold.
    """
    return "\n".join([f"FROM ./{gguf}", *_template_lines(template), *_parameters(base)]) + "\n"


def _template_lines(template: str | None) -> Iterator[str]:
    if template is None:
        yield "# No TEMPLATE: this model's cannot be said in Ollama's language. It takes one that it knows, or none."
    else:
        yield f'TEMPLATE """{template}"""'


def _parameters(base: Path) -> Iterator[str]:
    for text in stop_strings(base):
        if '"' in text or not _can_be_written(text):
            raise ExportError(
                f"the stop string {text!r} cannot stand in a Modelfile; export a plain GGUF (--for llama.cpp)"
            )
        yield f'PARAMETER stop "{text}"'
    longest = int(text_config(read_config(base)).get("max_position_embeddings") or MOST_CONTEXT)
    yield f"PARAMETER num_ctx {min(longest, MOST_CONTEXT)}"
    generation = _generation(base)
    for name in SAMPLING:
        if isinstance(generation.get(name), int | float):
            yield f"PARAMETER {RENAMED.get(name, name)} {json.dumps(generation[name])}"


def write_modelfile(base: Path, folder: Path, gguf: str, adapter: Path | None = None) -> None:
    """Writes the Modelfile beside the file `gguf`.

    Raises:
        ExportError: a stop string that a Modelfile cannot hold.
    """
    render, bos = chat_template(base, adapter)
    joints = find_joints(render) if render else None
    template = go_template(joints, bos if adds_bos(folder / gguf) else "") if joints else None
    (folder / MODELFILE).write_text(modelfile(base, gguf, template), encoding="utf-8")


def adds_bos(gguf: Path) -> bool:
    """Whether llama.cpp puts the BOS token before every text: `tokenizer.ggml.add_bos_token`.

    Where a file does not say it, llama.cpp does so for SentencePiece vocabularies ("llama") and not for the others.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    field = reader.get_field("tokenizer.ggml.add_bos_token")
    if field is not None:
        return bool(field.contents())
    model = reader.get_field("tokenizer.ggml.model")
    return model is not None and model.contents() == "llama"


def read_modelfile(text: str) -> dict[str, list[str]]:
    """What a Modelfile of ours says: the values of FROM, TEMPLATE and each PARAMETER, in order."""
    found: dict[str, list[str]] = {}
    while text:
        line, _, rest = text.partition("\n")
        name, _, value = line.partition(" ")
        if name == "PARAMETER":
            name, _, value = value.partition(" ")
        if value.startswith('"""'):
            value, _, rest = f"{value}\n{rest}"[3:].partition('"""')
        if name and not name.startswith("#"):
            found.setdefault(name, []).append(value.strip('"') if name == "stop" else value)
        text = rest.removeprefix("\n") if name == "TEMPLATE" else rest
    return found
