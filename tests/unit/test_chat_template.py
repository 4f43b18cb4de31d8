"""Templates are strangers' programs: rendered within limits, checked on the user's rows, given where one is missing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from studio import CheckpointError, DataError
from studio.base import EMBEDDED_DIR
from studio.chat_template import (
    TemplateRenderer,
    chat_template,
    check_rendered,
    rendered,
    stop_tokens,
    template_warnings,
)
from studio.data import Example, Message, Place, PlainText, Preference
from studio.default_templates import DEFAULTS, default_template
from studio.encoding import encode

ASK = {"role": "user", "content": "2 + 2 ="}
EXAMPLE = Example((Message("user", "2 + 2 ="),), (Message("assistant", "4"),))
LONG = Example((Message("user", "2 + 2 = " * 40),), (Message("assistant", "4"),))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The embedded base without its weights."""
    folder = tmp_path / "base"
    shutil.copytree(EMBEDDED_DIR, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def with_template(base: Path, text: str) -> Path:
    (base / "chat_template.jinja").write_text(text, encoding="utf-8")
    return base


def without_template(base: Path, *tokens: str) -> Path:
    """A base whose tokenizer holds `tokens` beside its own, and that has no template."""
    (base / "chat_template.jinja").unlink()
    file = base / "tokenizer.json"
    values = json.loads(file.read_text())
    own = [token for token in values["added_tokens"] if "header" not in token["content"]]
    extra = [{**own[0], "id": 5000 + number, "content": token} for number, token in enumerate(tokens)]
    file.write_text(json.dumps({**values, "added_tokens": own + extra}))
    return base


def test_an_example_is_rendered_by_the_models_own_template() -> None:
    with TemplateRenderer(EMBEDDED_DIR) as renderer:
        text = rendered(renderer, EXAMPLE)
        assert rendered(renderer, PlainText("as it is")).whole == "as it is"
    assert text.prompt == (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\n2 + 2 =<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    )
    assert text.whole == text.prompt + "4<|eot|>"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "took over 2 s"),
        (
            "{% set t = namespace(x='ab') %}{% for a in range(60) %}{% set t.x = t.x + t.x %}{% endfor %}",
            "memory|Memory",
        ),
        ("{{ raise_exception('no system turns') }}", "refuses a conversation: TemplateError: no system turns"),
        ("{% if %}", "refuses a conversation: TemplateSyntaxError"),
        ("{{ messages.__class__.__mro__ }}", "refuses a conversation: SecurityError"),
    ],
)
def test_a_template_that_runs_wild_or_refuses_is_an_error_and_nothing_more(
    base: Path, template: str, said: str
) -> None:
    wild = with_template(base, template)
    seconds = 2.0 if "took" in said else 60.0
    with TemplateRenderer(wild, seconds, memory_bytes=2**30) as renderer, pytest.raises(CheckpointError, match=said):
        renderer.render([ASK])
    assert renderer.child.poll() is not None


def test_a_prompt_that_the_answer_changes_is_refused(base: Path) -> None:
    counting, said = with_template(base, "{{ messages | length }}"), "differently once the answer follows"
    with TemplateRenderer(counting) as renderer, pytest.raises(CheckpointError, match=said):
        rendered(renderer, EXAMPLE)


def test_rows_whose_prompt_fills_the_length_or_that_the_template_refuses_are_told_by_line(base: Path) -> None:
    seen: list[tuple[int, int]] = []
    rows = [EXAMPLE, PlainText("x" * 9999)]
    assert check_rendered(base, rows, 32, lambda *done: seen.append(done)) == (rows, [])
    assert seen == [(1, 2), (2, 2)]
    long = replace(LONG, place=Place("rows.jsonl", 7))
    good, (problem,) = check_rendered(base, [EXAMPLE, long], 32)
    assert good == [EXAMPLE] and (problem.file, problem.line) == ("rows.jsonl", 7)
    assert (
        str(problem) == "line 7, prompt: has 249 tokens; allowed: fewer than data.max_length_tokens, 32; raise it "
        "or shorten the prompt"
    )
    refusing = "{% if messages[0].content|length > 99 %}{{ raise_exception('too much talk') }}{% endif %}"
    with_template(base, refusing + (base / "chat_template.jinja").read_text())
    good, (problem,) = check_rendered(base, [EXAMPLE, long], 9999)
    assert good == [EXAMPLE]
    assert str(problem) == "line 7: the chat template refuses the conversation: too much talk"
    (said,) = template_warnings(base, [EXAMPLE, LONG])
    assert said.startswith(
        "the chat template refuses 1 of the first 2 conversations: too much talk. The job names each"
    )


def test_pairs_that_are_cut_to_the_same_text_are_told_by_line(base: Path) -> None:
    said = [(Message("assistant", "word " * 40 + end),) for end in ("yes", "no")]
    pair = Preference(EXAMPLE.prompt, said[0], said[1], place=Place("pairs.jsonl", 9))
    assert check_rendered(base, [pair], 999) == ([pair], [])
    good, (problem,) = check_rendered(base, [pair], 32)
    assert not good and str(problem).startswith(
        "line 9: chosen and rejected are the same once both are cut to data.max"
    )


def test_earlier_turns_that_the_template_rewrites_are_told_by_line_where_they_are_learned(base: Path) -> None:
    turns = (Message("user", "hi"), Message("assistant", "ho", "because"), Message("user", "2 + 2 ="))
    several = replace(EXAMPLE, prompt=turns, place=Place("rows.jsonl", 3))
    assert check_rendered(base, [several, EXAMPLE], 999, earlier_turns=True) == ([several, EXAMPLE], [])
    text = "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.reasoning_content %}{{ m.reasoning_content }}"
    with_template(
        base, text + "{% endif %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert check_rendered(base, [several], 999) == ([several], [])
    good, (problem,) = check_rendered(base, [several, EXAMPLE], 999, earlier_turns=True)
    assert good == [EXAMPLE] and str(problem).startswith(
        "line 3: this model's chat template writes an assistant's turn"
    )
    with pytest.raises(DataError, match="line 3: this model's chat template writes"):
        encode(AutoTokenizer.from_pretrained(base), several, 999, "assistant")


def test_answers_that_do_not_end_where_the_model_stops_are_told(base: Path) -> None:
    assert stop_tokens(base) == ("<|end_of_text|>", "<|eot|>")
    assert template_warnings(base, [EXAMPLE]) == ()
    text = (base / "chat_template.jinja").read_text()
    with_template(base, text.replace("'<|eot|>'", "'<|step|>'"))
    (said,) = template_warnings(base, [EXAMPLE])
    assert said.startswith("1 of 1 answers end with ") and "<|step|>" in said and "'<|eot|>'" in said


def test_several_named_templates_need_a_default(base: Path) -> None:
    (base / "chat_template.jinja").unlink()
    file = base / "tokenizer_config.json"
    config = json.loads(file.read_text())
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    file.write_text(json.dumps({**config, "chat_template": named}))
    assert (chat_template(base).text, chat_template(base).is_default) == ("d", False)
    file.write_text(json.dumps({**config, "chat_template": named[:1]}))
    with pytest.raises(CheckpointError, match="its chat templates are tool_use; expected one called default"):
        chat_template(base)


@pytest.mark.parametrize("default", DEFAULTS, ids=lambda default: default.name)
def test_every_default_renders_keeps_the_prompt_and_ends_the_answer(base: Path, default) -> None:
    without_template(base, *default.tokens)
    config = json.loads((base / "config.json").read_text())
    model_type = next(iter(default.families), "olmoe")
    (base / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    assert chat_template(base).text == default.template and chat_template(base).is_default
    turns = (Message("system", "Be brief."), Message("user", "a"), Message("assistant", "b"), Message("user", " c "))
    with TemplateRenderer(base) as renderer:
        text = rendered(renderer, Example(turns, (Message("assistant", " d "),)))
        with pytest.raises(CheckpointError, match="no form for tool calls"):
            renderer.render([ASK, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}])
    assert text.prompt.count("Be brief.") == 1 and text.prompt.index("Be brief.") < text.prompt.rindex("c")
    answer = text.whole.removeprefix(text.prompt)
    ends = [token for token in (*default.tokens, "<|eot|>") if answer.rstrip().endswith(token)]
    assert ends and answer.rstrip().removesuffix(ends[-1]).strip() == "d"


def test_a_family_is_known_by_its_tokens_and_else_turns_are_plain_text() -> None:
    chatml = frozenset({"<|im_start|>", "<|im_end|>", "</s>"})
    assert "<|im_start|>" in default_template(chatml, "mixtral")
    assert "[INST]" in default_template(frozenset({"</s>"}), "mixtral")
    assert "capitalize" in default_template(frozenset({"</s>"}), "olmoe")
