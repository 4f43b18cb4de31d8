"""The check of the format "safetensors": a merged model directory that stock transformers loads.

    files ─▶ names, shapes, dtypes ─▶ config and tie flags ─▶ weights, matrix by matrix ─▶ tokenizer
          ─▶ load in stock transformers ─▶ behaviour

Files that cannot be read end the check early; everything else is looked at, so that one run tells all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.checkpoint import TensorInfo, read_header, read_index, read_json_object, text_config
from adapters.errors import CheckpointError, listed
from adapters.export import Options, Source
from adapters.verify import Check, Evidence
from adapters.verify.behaviour import LIMITS, Limits, behaviour_not_run, check_behaviour
from adapters.verify.fresh import FreshProcessError, ask_stock
from adapters.verify.tokenizer import check_tokenizer
from adapters.verify.weights import FileReader, audit, dtype_names

WHOLE, NAMED, CONFIG, LOADED, TIED = (
    "files: whole",
    "weights: names, shapes and dtypes",
    "config: the base's",
    "loads in stock transformers",
    "config: tied embeddings",
)
INDEX = "model.safetensors.index.json"


def check_safetensors(directory: Path, source: Source, evidence: Evidence, options: Options) -> list[Check]:
    """Every check of a merged model; see the module."""
    whole = check_whole(directory)
    if whole.status == "failed":
        return [whole]
    before, after = read_index(source.base), read_index(directory)
    named = check_names(before, after, options.dtype)
    checks = [whole, named, check_config(directory, source.base, options.dtype)]
    if named.status == "passed":
        checks += audit(source, FileReader(directory), dtype=options.dtype)
    checks += check_tokenizer(directory, source)
    return [*checks, *check_in_transformers(directory, source, evidence, LIMITS[_coarsest(after)])]


def check_whole(directory: Path) -> Check:
    """Every weight file has all its bytes and no more, and the index names just what is there."""
    try:
        index = read_index(directory)
        problems = [problem for file in {info.file for info in index.values()} for problem in _gaps(file)]
    except CheckpointError as error:
        return Check(WHOLE, "failed", str(error))
    there, used = {file.name for file in directory.glob("*.safetensors")}, {i.file.name for i in index.values()}
    problems += [f"{name} is not in {INDEX}" for name in sorted(there - used)]
    if (directory / INDEX).is_file():
        mapped = read_json_object(directory / INDEX).get("weight_map", {})
        problems += [f"{INDEX} puts {k} elsewhere" for k, i in index.items() if mapped.get(k) != i.file.name]
        problems += [f"{INDEX} names {k}, which is in no file" for k in mapped if k not in index]
    detail = listed("damaged", problems, 8) if problems else f"{len(used)} weight files, {len(index)} tensors"
    return Check(WHOLE, "failed" if problems else "passed", detail, {"weight_files": len(used), "tensors": len(index)})


def _gaps(file: Path) -> list[str]:
    """Bytes of a safetensors file that belong to no tensor, or to two: the format allows neither."""
    spans = sorted((info.start, info.start + info.size_bytes) for info in read_header(file)[0].values())
    ends = [spans[0][0], *(end for _, end in spans)] if spans else []
    holes = [
        f"{file.name} has a gap or overlap at byte {start}"
        for (start, _), end in zip(spans, ends, strict=False)
        if start != end
    ]
    if spans and spans[-1][1] != file.stat().st_size:
        holes.append(f"{file.name} has {file.stat().st_size} bytes, its tensors end at {spans[-1][1]}")
    return holes


def check_names(before: Mapping[str, TensorInfo], after: Mapping[str, TensorInfo], dtype: str | None) -> Check:
    """The same tensors as in the base's files, each of its shape, in its dtype or the one asked for."""
    problems = [f"{key} is missing" for key in before if key not in after]
    problems += [f"{key} is not in the base" for key in after if key not in before]
    for key in before.keys() & after.keys():
        if after[key].shape != before[key].shape:
            problems.append(f"{key} is {after[key].shape}, the base's {before[key].shape}")
        elif after[key].dtype not in dtype_names(key, before[key], dtype):
            problems.append(
                f"{key} is {after[key].dtype}, expected {' or '.join(dtype_names(key, before[key], dtype))}"
            )
    detail = (
        listed(f"{len(problems)} differ", problems, 8) if problems else f"{len(after)} tensors as in the base's index"
    )
    return Check(NAMED, "failed" if problems else "passed", detail, {"tensors": len(after)})


def check_config(directory: Path, base: Path, dtype: str | None = None, allowed: tuple[str, ...] = ()) -> Check:
    """config.json says what the base's says, and the dtype that was asked for: a field lost here changes the model."""
    files = [read_json_object(path / "config.json") for path in (base, directory)]
    before, after = (_plain(file, allowed) for file in files)
    problems = [
        f"{key} is {after.get(key)!r}, the base's {before.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    said, expected = _named_dtype(files[1]), dtype or _named_dtype(files[0])
    if said != expected:
        problems.append(f"its dtype is {said}, expected {expected}")
    fine = f"all {len(before)} fields, and dtype {said}"
    detail = listed(f"{len(problems)} fields differ", problems, 8) if problems else fine
    return Check(CONFIG, "failed" if problems else "passed", detail)


def _plain(config: Mapping[str, Any], allowed: tuple[str, ...]) -> dict[str, Any]:
    left_out = {"dtype", "torch_dtype", *allowed}
    found = {key: value for key, value in config.items() if key not in left_out}
    return {key: _plain(value, ()) if isinstance(value, dict) else value for key, value in found.items()}


def _named_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype in which programs load the weights if nobody says otherwise."""
    text = text_config(config)
    found = next((part[key] for part in (text, config) for key in ("dtype", "torch_dtype") if part.get(key)), None)
    return str(found) if found else None


def check_in_transformers(directory: Path, source: Source, evidence: Evidence, limits: Limits) -> list[Check]:
    """Loads the directory in stock transformers and compares what it says."""
    if evidence.logits is None:
        why = evidence.why_none or "no evidence was made"
        return [Check(LOADED, "not run", why), *behaviour_not_run(why)]
    with tempfile.TemporaryDirectory(prefix="studio-logits-") as folder:
        logits = Path(folder) / "logits.safetensors"
        question = {"model": directory, "prompts": evidence.prompts, "logits": logits}
        try:
            answer = ask_stock("stock_transformers.py", question)
        except FreshProcessError as error:
            return [Check(LOADED, "failed", str(error))]
        program = f"stock transformers {answer['version']}"
        return [_loaded(answer), _tied(answer, source.base), *check_behaviour(evidence, logits, limits, program)]


def _loaded(answer: Mapping[str, Any]) -> Check:
    problems = [f"{key} {word}" for word in ("missing", "mismatched") for key in answer[word]]
    problems += [f"{name} is not finite" for name in answer["not_finite"]]
    detail = listed("not as it is", problems, 8) if problems else "nothing missing, nothing of another shape"
    measured = {"unexpected": answer["unexpected"][:20], "transformers": answer["version"]}
    return Check(LOADED, "failed" if problems else "passed", detail, measured)


def _tied(answer: Mapping[str, Any], base: Path) -> Check:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config()
    expected = bool(config.tie_word_embeddings)
    own = any(key.endswith("lm_head.weight") for key in read_index(base))  # kept by stock, whatever the flag says
    right = answer["tied"] == expected and (own or answer["head_is_embedding"] == expected)
    places = {"config": answer["tied"], "as loaded": answer["head_is_embedding"], "the base": expected}
    detail = "; ".join(f"{place}: {'tied' if tied else 'not tied'}" for place, tied in places.items())
    return Check(TIED, "passed" if right else "failed", detail, {"tied": answer["tied"]})


def _coarsest(index: Mapping[str, TensorInfo]) -> str:
    """The dtype of the weights that rounds most, by its name in `LIMITS`."""
    names = {info.dtype for info in index.values()}
    return "bfloat16" if "BF16" in names else "float16" if "F16" in names else "float32"
