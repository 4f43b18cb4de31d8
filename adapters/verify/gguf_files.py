"""The check of the format "gguf": one file that llama.cpp runs.

    file ─▶ metadata ─▶ weights read back, matrix by matrix ─▶ tokenizer, template, end of sequence in llama.cpp
         ─▶ loaded and run by llama.cpp, teacher-forced, and greedy text

llama.cpp itself runs in processes of its own; it may abort on a file that it does not like.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf.constants import LlamaFileType
from ruamel.yaml import YAML
from safetensors import safe_open

from adapters.chat_template import load_tokenizer, own_template
from adapters.checkpoint import read_config
from adapters.errors import ExportError, listed
from adapters.export import Options, Source
from adapters.export.gguf import DEFAULT_QUANT, gguf_file
from adapters.export.gguf_tokenizer import generation_ends
from adapters.export.gguf_types import PLAIN
from adapters.verify import Check, Evidence
from adapters.verify.behaviour import APART, Limits, behaviour_not_run, check_behaviour, same_choice
from adapters.verify.fresh import FreshProcessError, ask_stock
from adapters.verify.gguf_weights import GgufWeights, file_problems, text_of
from adapters.verify.llama_cpp import LlamaCppRun, LlamaCppTimeout, run_llama_cpp
from adapters.verify.tokenizer import CONVERSATIONS, NASTY
from adapters.verify.weights import audit

WHOLE, METADATA, LOADED, GREEDY = "file: whole", "file: metadata", "loads in llama.cpp", "behaviour: greedy text"
IDS, BOS, TEMPLATE, ENDS = (
    "tokenizer: ids",
    "tokenizer: one beginning-of-sequence token",
    "tokenizer: chat template",
    "tokenizer: end of sequence",
)
GREEDY_TOKENS = 24

LIMITS = {
    "F32": Limits(1e-6, 1.0, "right files measure near 1e-12, one layer's lost delta 4e-2"),
    "F16": Limits(1e-3, 0.99, "weights and activations of 11 bits"),
    "BF16": Limits(1e-2, 0.97, "weights and activations of 8 bits"),
    "Q8_0": Limits(1e-1, 0.90, "8 bits a weight and an activation"),
    "Q6_K": Limits(2e-1, 0.80, "6.6 bits a weight"),
    "Q5_K_M": Limits(3e-1, 0.60, "5.7 bits a weight"),
    "Q4_K_M": Limits(6e-1, 0.40, "4.9 bits a weight"),
    "Q4_0": Limits(1.0, 0.0, "4.6 bits a weight"),
    "IQ4_XS": Limits(1.0, 0.0, "4.4 bits a weight"),
    "Q3_K_M": Limits(2.0, 0.0, "3.9 bits a weight"),
    "Q2_K": Limits(6.0, 0.0, "3.0 bits a weight: far from any full-precision model"),
}
"""By file type. Those of few bits are wide, since small models lose far more by them than large ones (a random one of
3.9 bits kept 19 % of its first choices, at a KL of 0.4): whether the adapter is in such a file is told by its weights,
where rounding cancels along each delta."""

YARN_LIMIT = Limits(1e-3, 0.99, "llama.cpp rounds the bounds of YaRN's ramp, this config does not: up to 2e-4 measured")


def check_gguf(directory: Path, source: Source, evidence: Evidence, options: Options) -> list[Check]:
    """Every check of a GGUF export; see the module."""
    try:
        file = gguf_file(directory)
        problems = file_problems(file)
    except (ExportError, ValueError, OSError) as error:
        return [Check(WHOLE, "failed", f"cannot be read as GGUF: {error}")]
    if problems:
        return [Check(WHOLE, "failed", "; ".join(problems))]
    quant = options.quant or DEFAULT_QUANT
    weights = GgufWeights(file, source.base)
    size = {"bytes": file.stat().st_size, "tensors": len(weights.tensors)}
    checks = [Check(WHOLE, "passed", f"{len(weights.tensors)} tensors", size), check_metadata(weights, source, quant)]
    try:
        checks += audit(source, weights.read, weights.rounding, "float32" if quant == "F32" else None)
    except ExportError as error:
        checks.append(Check("weights: names and shapes", "failed", str(error)))
    return [*checks, *check_vocabulary(file, source), *check_run(file, source, evidence, quant)]


def check_metadata(weights: GgufWeights, source: Source, quant: str) -> Check:
    """Name, file type and licence as they should be."""
    expected: dict[str, Any] = {
        "general.name": source.name,
        "general.file_type": int(LlamaFileType["ALL_F32" if quant == "F32" else f"MOSTLY_{quant}"]),
        "general.license": licence_in(source.base),
    }
    found = {key: text_of(weights.reader, key) for key in expected}
    problems = [
        f"{key} is {found[key]!r}, expected {value!r}" for key, value in expected.items() if found[key] != value
    ]
    detail = "; ".join(problems) or f"name {source.name!r}, type {quant}, licence {expected['general.license']}"
    return Check(METADATA, "failed" if problems else "passed", detail, found)


def licence_in(base: Path) -> str | None:
    """The `license` of the base's card, as a hub reads it; "other" where a Llama licence lies there and no card."""
    for card in (base / "README.md", base / "MODEL_CARD.md"):
        lines = card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else []
        if lines[:1] == ["---"] and "---" in lines[1:]:
            said = YAML(typ="safe").load("\n".join(lines[1 : lines.index("---", 1)])) or {}
            if said.get("license"):
                return str(said["license"])
    texts = [file.read_text(errors="replace") for file in base.glob("*[Ll][Ii][Cc][Ee][Nn]*") if file.is_file()]
    return "other" if any("llama" in text.lower() and "community license" in text.lower() for text in texts) else None


def check_vocabulary(file: Path, source: Source) -> list[Check]:
    """What llama.cpp makes of text, against stock transformers with the base's files and the adapter's template."""
    try:
        question = {
            "directories": [source.base],
            "strings": NASTY,
            "conversations": CONVERSATIONS,
            "template": own_template(source.adapter),
        }
        (stock,) = ask_stock("stock_tokenizer.py", question)
        return compare_vocabulary(file, source, stock)
    except (FreshProcessError, ExportError) as error:
        return [Check(IDS, "failed", str(error))]


def compare_vocabulary(file: Path, source: Source, stock: Mapping[str, Any]) -> list[Check]:
    """The same, where the answer of stock transformers (`stock_tokenizer.py`) is at hand."""
    run = run_llama_cpp(file, texts=[*NASTY, "a"])
    return [_ids(run, stock), _bos(run, stock), _template(run, source), _ends(run, stock, source.base)]


def _ids(run: LlamaCppRun, stock: Mapping[str, Any]) -> Check:
    """Scripts with combining marks are told apart: llama.cpp's own splitting approximates them for some tokenizers."""
    pairs = list(zip(NASTY, run.tokens_with_special, stock["ids"], strict=False))
    wrong = [(text, theirs, ours) for text, theirs, ours in pairs if theirs != ours]
    known = [text for text, _, _ in wrong if approximated(text)]
    problems = [
        f"{text[:30]!r} gives {theirs[:8]}, stock transformers {ours[:8]}"
        for text, theirs, ours in wrong
        if not approximated(text)
    ]
    told = f"{len(pairs) - len(wrong)} of {len(pairs)} nasty strings give the ids of stock transformers"
    rest = f"; llama.cpp splits or composes these in its own way: {', '.join(map(repr, known))}" if known else ""
    detail = listed(f"{len(problems)} strings differ", problems, 5) if problems else told + rest
    measured = {"strings": len(pairs), "approximated_by_llama_cpp": known, "llama_cpp": run.version}
    return Check(IDS, "failed" if problems else "passed", detail, measured)


def approximated(text: str) -> bool:
    """Whether a text holds combining marks: llama.cpp composes none (NFC), and takes them for letters or not by its own
    reading of some tokenizers' expressions."""
    return any(unicodedata.category(letter).startswith("M") for letter in text)


def _bos(run: LlamaCppRun, stock: Mapping[str, Any]) -> Check:
    """The file says whether a BOS is put in front; twice is as wrong as never."""
    bos, found = stock["bos"], run.tokens_with_special[-1]
    expected = 0 if bos is None else stock["ids"][1][:2].count(bos)
    count = 0 if bos is None else found.count(bos)
    right = count == expected and (bos is None or run.facts["bos"] == bos)
    detail = (
        f"llama.cpp puts {count} in front of a text (id {run.facts['bos']}), stock transformers {expected} (id {bos})"
    )
    return Check(BOS, "passed" if right else "failed", detail, {"add_bos": run.facts["add_bos"], "bos": bos})


def _template(run: LlamaCppRun, source: Source) -> Check:
    from adapters.export.gguf_tokenizer import chat_template

    whose = "adapter" if own_template(source.adapter) else "base"
    expected, found = chat_template(load_tokenizer(source.base, source.adapter)), run.facts["chat_template"]
    right = expected == found
    words = {True: f"byte for byte the {whose}'s" if expected else "the base has none, nor has the file"}
    detail = words.get(right, f"{len(found or '')} characters, the {whose}'s has {len(expected or '')}")
    return Check(TEMPLATE, "passed" if right else "failed", detail)


def _ends(run: LlamaCppRun, stock: Mapping[str, Any], base: Path) -> Check:
    """llama.cpp stops at the tokenizer's EOS and wherever config.json and generation_config.json say."""
    expected, found = set(generation_ends(base, stock["eos"])), set(run.facts["end_of_generation"])
    problems = [f"the file's EOS is {run.facts['eos']}, the base's {stock['eos']}"] * (run.facts["eos"] != stock["eos"])
    if expected - found:
        problems.append(f"llama.cpp stops at {sorted(found)}, the base at {sorted(expected)}")
    for ends in stock["ends"]:
        if ends and not found & set(ends):
            problems.append(f"the chat template ends an answer with {ends}, where llama.cpp does not stop")
    detail = "; ".join(problems) or f"EOS {run.facts['eos']}; llama.cpp stops at {sorted(found)}"
    return Check(ENDS, "failed" if problems else "passed", detail, {"eos": run.facts["eos"], "stops_at": sorted(found)})


def check_run(file: Path, source: Source, evidence: Evidence, quant: str) -> list[Check]:
    """Logits of the prompts, teacher-forced, and greedy text behind each."""
    if evidence.logits is None:
        why = evidence.why_none or "no evidence was made"
        skipped = [Check(name, "not run", why) for name in (LOADED, GREEDY)]
        return [*skipped, *behaviour_not_run(why)]
    try:
        run = run_llama_cpp(file, evidence.prompts, greedy_tokens=GREEDY_TOKENS)
    except LlamaCppTimeout as error:  # too slow here says nothing about the file
        return [Check(name, "not run", str(error)) for name in (LOADED, GREEDY)] + behaviour_not_run(str(error))
    except ExportError as error:
        return [Check(LOADED, "failed", str(error))]
    program = f"llama.cpp {run.version}"
    logits = {f"export.{number}": found for number, found in enumerate(run.logits)}
    checks = check_behaviour(evidence, logits, limits_of(source.base, quant), program)
    if quant not in PLAIN:
        checks = [_apart_of_few_bits(check) if check.name == APART else check for check in checks]
    return [Check(LOADED, "passed", f"{program} loads it and checks its data"), *checks, _greedy(run, evidence, quant)]


def limits_of(base: Path, quant: str) -> Limits:
    """What is allowed of the file type, and of what llama.cpp does in its own way."""
    rope = read_config(base).get("rope_parameters") or read_config(base).get("rope_scaling") or {}
    own = rope.get("rope_type", rope.get("type")) == "yarn" and rope.get("truncate") is False
    return YARN_LIMIT if own and quant == "F32" else LIMITS[quant]


def _apart_of_few_bits(check: Check) -> Check:
    """Rounding to few bits can move a model further than training did, but no nearer to the base.

    An export that is the base says almost what the base says. Where it is about as far from both, the distance from
    either is rounding, and only the weights can tell the two apart: that is never passed.
    """
    noise, moved = check.measured["kl_export_from_trained"], check.measured["kl_trained_from_base"]
    from_base = check.measured["kl_export_from_base"]
    words = f"a KL of {noise:.1e} from the trained model, {from_base:.1e} from the base"
    if noise <= from_base:
        return Check(APART, "passed", words, check.measured)
    if noise < moved or from_base < noise / 2:
        return Check(APART, "failed", f"{words}: the export is nearer to the base", check.measured)
    words += f"; training moved the model by {moved:.1e}: rounding hides that here, only the weights tell"
    return Check(APART, "not run", words, check.measured)


def _greedy(run: LlamaCppRun, evidence: Evidence, quant: str) -> Check:
    """The first token of each continuation is the trained model's first choice, wherever that one is decided.

    Asked of unquantised types alone: one close call turns all that follows.
    """
    assert evidence.logits is not None
    wrong, decided = [], 0
    with safe_open(evidence.logits, "pt") as reference:
        for number, made in enumerate(run.greedy):
            last = reference.get_tensor(f"tuned.{number}")[-1:]
            if len(same_choice(last, last)):
                decided += 1
                wrong += [number] * (made[:1] != [int(last.argmax())])
    share = 1 - len(wrong) / decided if decided else 1.0
    measured = {"texts": run.greedy_texts, "decided": decided, "first_tokens_right": share}
    right = share >= {"F32": 1.0, "F16": 0.5, "BF16": 0.5}.get(quant, 0.0) and all(run.greedy)
    detail = f"{len(run.greedy)} continuations; {decided - len(wrong)} of {decided} begin as the trained model's would"
    return Check(GREEDY, "passed" if right else "failed", detail, measured)
