"""The head of a reward model in a merged model directory.

    reward-head.safetensors   "score.weight" (1, hidden) float32, named in model.safetensors.index.json
    model-body.safetensors    what was model.safetensors, of a base in one file
    config.json               "reward_head": {"tensor": "score.weight", "reads": "last token"}, for the studio; where
                              transformers has a sequence-classification class for the family, that class with one
                              label: AutoModelForSequenceClassification.from_pretrained(DIRECTORY) gives the score

score = weight · hidden state of the conversation's last token, after the decoder's final norm. transformers takes for
the last token the last one that is not config.json's pad_token_id. Where conversations end with that very token,
pad_token_id is null in the merged config: transformers then scores one conversation at a time, instead of reading the
wrong token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapters.checkpoint import read_index, read_json_object
from adapters.verify import Check
from studio.methods import REWARD_HEAD

INDEX = "model.safetensors.index.json"
SINGLE, BODY, HEAD = "model.safetensors", "model-body.safetensors", "reward-head.safetensors"
TENSOR = "score.weight"
WRITTEN = "head: as trained"


def is_reward_model(adapter: Path) -> bool:
    """Whether an adapter directory has a reward head."""
    return (adapter / REWARD_HEAD).is_file()


def without_head(directory: Path, base: Path) -> None:
    """Takes away what a merge that was killed here has written of a head, so that the weights are looked at alone."""
    if not (directory / HEAD).is_file():
        return
    (directory / HEAD).unlink()
    if not (base / INDEX).is_file():
        (directory / INDEX).unlink(missing_ok=True)
        (directory / BODY).unlink(missing_ok=True)


def add_head(directory: Path, adapter: Path) -> dict[str, Any]:
    """Writes the head of `adapter` into the merged model in `directory`.

    Returns:
        {"class": transformers' class that loads the directory, None where there is none; "renamed": {file: new name}}.
    """
    from safetensors.torch import load_file, save_file

    weight = load_file(adapter / REWARD_HEAD)["weight"]
    renamed = {}
    if (directory / SINGLE).is_file() and not (directory / INDEX).is_file():
        (directory / SINGLE).rename(directory / BODY)  # else transformers would read that file alone
        renamed = {SINGLE: BODY}
        infos = read_index(directory)
        found: dict[str, Any] = {"metadata": {}, "weight_map": dict.fromkeys(infos, BODY)}
        found["metadata"]["total_size"] = sum(info.size_bytes for info in infos.values())
    else:
        found = read_json_object(directory / INDEX)
    save_file({TENSOR: weight}, directory / HEAD, metadata={"format": "pt"})
    found["weight_map"][TENSOR] = HEAD
    found["metadata"]["total_size"] = found["metadata"].get("total_size", 0) + weight.nbytes
    _write(directory / INDEX, found)
    config = read_json_object(directory / "config.json")
    config["reward_head"] = {"tensor": TENSOR, "reads": "last token"}
    if name := stock_class(str(config.get("model_type"))):
        config |= {"architectures": [name], "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        config["pad_token_id"] = _pad_token(directory)
    _write(directory / "config.json", config)
    return {"class": name, "renamed": renamed}


def stock_class(model_type: str) -> str | None:
    """transformers' sequence-classification class of a family."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

    return NAMES.get(model_type)


def check_head(directory: Path, adapter: Path) -> list[Check]:
    """Whether the directory is whole with its head, and that is the trained one, bit for bit."""
    from safetensors.torch import load_file

    from adapters.tensor_files import read_tensor
    from adapters.verify.model_files import check_whole

    whole = check_whole(directory)
    if whole.status == "failed":
        return [whole]
    info = read_index(directory).get(TENSOR)
    same = info is not None and read_tensor(info).equal(load_file(adapter / REWARD_HEAD)["weight"])
    detail = f"{TENSOR} in {HEAD} is that of the adapter" if same else f"{TENSOR} is not that of the adapter"
    return [Check(WRITTEN, "passed" if same else "failed", detail)]


def _pad_token(directory: Path) -> int | None:
    """The id of the padding, unless conversations may end with it."""
    from studio.base_model import load_tokenizer

    pad = load_tokenizer(directory).pad_token_id
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    last = load_tokenizer(directory).apply_chat_template(turns, tokenize=True, return_dict=False)[-1]
    return None if pad == last else pad


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
