"""The shipped base and the quickstart's tickets: what is promised about the files, checked without loading a model."""

import json
import runpy
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from studio.base import EMBEDDED_DIR
from studio.base.domains import DOMAINS, Document, documents
from studio.base.ticket_pairs import FLAWS, ticket_pairs
from studio.base.tickets import EVAL_ROWS, TRAIN_ROWS, Row, tickets
from studio.base.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, chat_messages, render
from studio.base.words import FAULTS, SITES, URGENCIES

DATA = Path(__file__).resolve().parents[2] / "recipes" / "data"
MAX_BYTES = 12_000_000
QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(EMBEDDED_DIR)


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((EMBEDDED_DIR / "config.json").read_text())


def _rows(name: str) -> list[Row]:
    return [json.loads(line) for line in (DATA / f"tickets-{name}.jsonl").read_text().splitlines()]


def _texts(row: Row) -> tuple[str, str]:
    user, assistant = row["messages"]
    return user["content"], assistant["content"]


# the model directory -------------------------------------------------------------------------------------------------


def test_everything_shipped_stays_under_the_size_limit() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED_DIR.iterdir()) <= MAX_BYTES


def test_the_architecture_is_llama_4_with_every_layer_moe(config: dict) -> None:
    assert config["architectures"] == ["Llama4ForCausalLM"]
    assert config["model_type"] == "llama4_text"
    assert config["num_local_experts"] >= 16
    assert config["num_experts_per_tok"] == 1
    assert config["moe_layers"] == list(range(config["num_hidden_layers"]))
    assert 0 in config["no_rope_layers"] and 1 in config["no_rope_layers"]
    assert config["use_qk_norm"] and not config["tie_word_embeddings"]


def test_weights_are_bfloat16_and_complete(config: dict) -> None:
    hidden, width, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    attention = config["num_attention_heads"] * config["head_dim"]
    expected = {
        "model.embed_tokens.weight": [config["vocab_size"], hidden],
        "lm_head.weight": [config["vocab_size"], hidden],
        "model.norm.weight": [hidden],
    }
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        expected |= {
            f"{block}.input_layernorm.weight": [hidden],
            f"{block}.post_attention_layernorm.weight": [hidden],
            f"{block}.self_attn.q_proj.weight": [attention, hidden],
            f"{block}.self_attn.k_proj.weight": [config["num_key_value_heads"] * config["head_dim"], hidden],
            f"{block}.self_attn.v_proj.weight": [config["num_key_value_heads"] * config["head_dim"], hidden],
            f"{block}.self_attn.o_proj.weight": [hidden, attention],
            f"{block}.feed_forward.router.weight": [experts, hidden],
            f"{block}.feed_forward.experts.gate_up_proj": [experts, hidden, 2 * width],
            f"{block}.feed_forward.experts.down_proj": [experts, width, hidden],
            f"{block}.feed_forward.shared_expert.gate_proj.weight": [width, hidden],
            f"{block}.feed_forward.shared_expert.up_proj.weight": [width, hidden],
            f"{block}.feed_forward.shared_expert.down_proj.weight": [hidden, width],
        }
    with safe_open(EMBEDDED_DIR / "model.safetensors", framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (the file is no mapping)
        assert {name: part.get_shape() for name, part in slices.items()} == expected
        assert {part.get_dtype() for part in slices.values()} == {"BF16"}
    assert hidden % 64 == 0 and width % 64 == 0, "nf4 blocks of 64 must divide each expert's matrices"


def test_generation_ends_at_end_of_text_and_end_of_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    generation = json.loads((EMBEDDED_DIR / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot|>"])
    assert generation["pad_token_id"] == tokenizer.convert_tokens_to_ids("<|finetune_right_pad|>")


def test_the_card_names_the_rebuild_command_and_the_tables() -> None:
    card = (EMBEDDED_DIR / "MODEL_CARD.md").read_text()
    assert "python -m studio.base.pretrain --out DIR --seed 0 --steps" in card
    assert all(domain in card for domain in DOMAINS)
    assert "I(domain; expert)" in card


# tokenizer and chat format -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["PMP-4821 is hot.", 'a\n\n  b\t{"k": [1.5, "é 漢字 🙂"]}', "  ", "2024-03-15T10:22:07"]
)
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_special_tokens_are_single_ids_the_model_has(
    tokenizer: PreTrainedTokenizerFast, config: dict, token: str
) -> None:
    (token_id,) = tokenizer.encode(token, add_special_tokens=False)
    assert token_id < config["vocab_size"] == len(tokenizer)


def test_the_chat_template_writes_llama_4_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [*QUESTION, {"role": "assistant", "content": " 4 "}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nWhat is 2 + 2?<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n4<|eot|>"
    )


def test_the_generation_prompt_opens_the_assistant_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|eot|><|header_start|>assistant<|header_end|>\n\n")


def test_typed_content_parts_read_like_plain_text(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    assert tokenizer.apply_chat_template(parts) == tokenizer.apply_chat_template(QUESTION)


def test_pretraining_wrote_chats_as_the_template_does(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = next(document for document in documents("reports", 0) if document.turns)
    assert tokenizer.apply_chat_template(chat_messages(chat), tokenize=False) == render(chat)


def test_names_and_numbers_are_the_same_tokens_in_text_and_in_json(tokenizer: PreTrainedTokenizerFast) -> None:
    in_text = tokenizer.tokenize("at Norwick PMP-4821 failed")
    in_json = tokenizer.tokenize('{"a": "Norwick", "b": "PMP-4821"}')
    assert {"Norwick", "PMP", "-", "48", "2", "1"} <= set(in_text) & set(in_json)


def test_text_is_cut_by_a_pattern_that_llama_cpp_knows(tokenizer: PreTrainedTokenizerFast) -> None:
    split = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"][0]
    assert split["pattern"]["Regex"] == SPLIT_PATTERN and SPLIT_PATTERN.startswith("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^")


# domains -------------------------------------------------------------------------------------------------------------


def _first(domain: str, seed: int) -> list[Document]:
    return list(islice(documents(domain, seed), 100))


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domain_repeats_for_a_seed_and_varies_between_seeds(domain: str) -> None:
    assert _first(domain, 3) == _first(domain, 3)
    assert _first(domain, 3) != _first(domain, 4)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domain_writes_both_texts_and_chats(domain: str) -> None:
    first = _first(domain, 0)
    assert any(document.text for document in first) and any(document.turns for document in first)
    assert all(bool(document.text) != bool(document.turns) for document in first)
    assert all(document.domain == domain for document in first)


def test_the_base_has_not_seen_the_task() -> None:
    for domain in DOMAINS:
        for document in islice(documents(domain, 1), 300):
            for question, answer in document.turns:
                assert not (answer.startswith("{") and not question.rstrip().endswith("}")), (domain, question)


# tickets -------------------------------------------------------------------------------------------------------------


def _all_rows() -> Iterator[Row]:
    yield from _rows("train")
    yield from _rows("eval")


@pytest.mark.parametrize("module", ["tickets", "ticket_pairs", "known_tasks"])
def test_the_shipped_data_are_what_the_scripts_write(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--out", str(tmp_path)])
    runpy.run_module(f"studio.base.{module}", run_name="__main__")
    written = sorted(path.name for path in tmp_path.iterdir())
    assert len(written) == {"tickets": 6, "ticket_pairs": 2, "known_tasks": 1}[module]
    assert all(name in capsys.readouterr().out for name in written[:1])
    for name in written:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_the_splits_have_their_sizes_and_share_no_ticket_no_record_and_no_asset_number() -> None:
    train, held_out = _rows("train"), _rows("eval")
    assert (len(train), len(held_out)) == (TRAIN_ROWS, EVAL_ROWS)
    assert TRAIN_ROWS >= 1000 and EVAL_ROWS >= 200
    for part in (0, 1):
        assert not {_texts(row)[part] for row in train} & {_texts(row)[part] for row in held_out}
    numbers = [{json.loads(_texts(row)[1])["asset"][-4:] for row in rows} for rows in (train, held_out)]
    assert not numbers[0] & numbers[1]


def test_every_record_is_one_line_of_known_fields() -> None:
    for row in _all_rows():
        ticket, answer = _texts(row)
        record = json.loads(answer)
        assert "\n" not in answer and list(record) == ["asset", "site", "fault", "priority"]
        assert record["asset"] in ticket and record["site"] in ticket
        assert record["site"] in SITES and record["fault"] in FAULTS and record["priority"] in URGENCIES
        assert any(urgency in ticket for urgency in URGENCIES[record["priority"]])


def test_another_seed_gives_other_tickets() -> None:
    assert tickets(1) != tickets(0)


def test_tickets_are_short(tokenizer: PreTrainedTokenizerFast) -> None:
    assert max(len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in _all_rows()) <= 160


def test_a_pair_has_one_flaw_and_no_asset_is_in_both_splits() -> None:
    train, held_out = ticket_pairs()
    assert Counter(row["source"] for row in held_out) == dict.fromkeys(FLAWS, len(held_out) // len(FLAWS))
    assets = [{json.loads(row["chosen"])["asset"].split("-")[1] for row in rows} for rows in (train, held_out)]
    assert not assets[0] & assets[1]
    for row in held_out:
        chosen, changed = json.loads(row["chosen"]), row["source"].removeprefix("wrong ")
        if changed in chosen:
            rejected = json.loads(row["rejected"])
            assert {name for name in chosen if chosen[name] != rejected[name]} == {changed}
