"""The harness on the studio's model against its own class on the stock model; an adapter from its file against PEFT."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, Llama4ForCausalLM

from adapters.applied import AppliedAdapter
from adapters.loading import load_base
from adapters.lora import attach
from adapters.peft_files import save_adapter
from adapters.placement import Placement
from studio.base import EMBEDDED_DIR
from studio.lm_tasks import RoutedLM, Tasks
from tests.numerics.test_evaluation import EXAMPLES

TASKS = Path(__file__).parents[2] / "recipes" / "tasks"
PAIRS = [
    ("Pump PMP-2041 at Marlow", " is leaking oil."),
    ("", "No hurry."),
    ("ts=10:22:07 level=warn unit=PMP-4821 temp=88\n" * 3, "ts=10:25:01 level=info"),
    ("37 + 58 =", " 95"),
    ("37 + 58 =", " 96"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EMBEDDED_DIR)


@pytest.fixture(scope="module")
def ours() -> Any:
    return load_base(EMBEDDED_DIR, quantize="none", dtype=torch.float32).eval()


def requests(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def test_log_likelihoods_are_those_of_the_stock_class_whatever_the_batch(ours: Any, tokenizer: Any) -> None:
    stock = HFLM(
        pretrained=Llama4ForCausalLM.from_pretrained(EMBEDDED_DIR, dtype=torch.float32),
        tokenizer=tokenizer,
        batch_size=1,
    )
    wanted = stock.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for size in (1, 4):
        seen: list[tuple[int, int]] = []
        lm = RoutedLM(ours, tokenizer, size, progress=lambda done, total, seen=seen: seen.append((done, total)))
        found = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
        assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], rel=1e-5)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
        assert seen[-1] == (len(PAIRS), len(PAIRS))
    long = requests("loglikelihood_rolling", [("".join(context + end for context, end in PAIRS),)])
    assert lm.loglikelihood_rolling(long, disable_tqdm=True) == pytest.approx(
        stock.loglikelihood_rolling(long, disable_tqdm=True), rel=1e-5
    )


def test_answers_are_those_of_the_stock_class_whatever_the_batch(ours: Any, tokenizer: Any) -> None:
    stock = HFLM(
        pretrained=Llama4ForCausalLM.from_pretrained(EMBEDDED_DIR, dtype=torch.float32),
        tokenizer=tokenizer,
        batch_size=1,
    )
    asked = [(context or "No", {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}) for context, _ in PAIRS]
    wanted = stock.generate_until(requests("generate_until", asked), disable_tqdm=True)
    for size in (1, 4):
        assert RoutedLM(ours, tokenizer, size).generate_until(requests("generate_until", asked)) == wanted


def test_a_too_long_context_loses_its_beginning(ours: Any, tokenizer: Any) -> None:
    lm = RoutedLM(ours, tokenizer, 2, max_length_tokens=16)
    end = tokenizer.encode("leaking oil.", add_special_tokens=False)
    context = tokenizer.encode("Pump PMP-2041 at Marlow is " * 5, add_special_tokens=False)
    whole = lm._loglikelihood_tokens([(None, context, end)])
    assert whole == lm._loglikelihood_tokens([(None, context[-(17 - len(end)) :], end)])


def test_the_chat_template_is_put_round_the_prompt_where_it_is_asked_for(
    ours: Any, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "2 + 2 =", "a": "4"}\n' * 3)
    (tmp_path / "sum.yaml").write_text(
        "task: sum\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        "output_type: loglikelihood\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "metric_list: [{metric: perplexity}, {metric: acc}]\n"
    )
    tasks = Tasks([str(tmp_path / "sum.yaml")])
    plain, chat = (tasks.run(ours, tokenizer, batch_size=2, chat_template=on) for on in (False, True))
    assert plain.keys() == {"sum/perplexity", "sum/acc"} and plain["sum/perplexity"].better == "lower"
    asked = [{"role": "user", "content": "2 + 2 ="}]
    template = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert template.startswith(tokenizer.bos_token)  # written out in the template: lm-eval adds no second one
    for found, start, text in ((plain, "2 + 2 =", "2 + 2 =4"), (chat, template, f"{template}4")):
        ids, begins = (tokenizer.encode(part, add_special_tokens=found is plain) for part in (text, start))
        with torch.no_grad():
            logits = ours(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        answer = range(len(begins), len(ids))
        loss = -sum(float(logits[place - 1, ids[place]]) for place in answer)
        assert found["sum/perplexity"].metric.value == pytest.approx(math.exp(loss), rel=1e-3)


def test_the_shipped_tasks_run_and_an_adapter_from_its_file_is_the_trained_one(tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    placement = Placement(attention=4, shared_expert=2, routed=((4,) * 16,) * 4, alpha=16.0)
    model = attach(load_base(EMBEDDED_DIR, quantize="nf4", dtype=torch.float32), placement).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    save_adapter(model, placement, tmp_path / "adapter", base_name="embedded", base=EMBEDDED_DIR, held={})
    base = load_base(EMBEDDED_DIR, quantize="nf4", dtype=torch.float32).eval()
    applied = AppliedAdapter(base, tmp_path / "adapter")
    ids = torch.tensor([tokenizer.encode(EXAMPLES[2].prompt[0].content)])
    with torch.no_grad():
        trained, before = model(input_ids=ids).logits, base(input_ids=ids).logits
        with applied:
            with_adapter = base(input_ids=ids).logits
        after = base(input_ids=ids).logits
    assert torch.equal(before, after) and (trained - before).abs().max() > 0.1
    torch.testing.assert_close(with_adapter, trained, rtol=1e-4, atol=1e-4)

    tasks = Tasks([str(TASKS / name) for name in ("domains.yaml", "tickets.yaml")])
    found = tasks.run(base, tokenizer, batch_size=8, examples=8)
    assert found.keys() == {"domains/acc", "domains/acc_norm", "tickets/exact_match"}
    assert found["domains/acc"].metric.value > 0.5 and found["domains/acc"].metric.n == 8
