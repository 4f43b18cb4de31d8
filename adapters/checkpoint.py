"""What a base model directory holds, read from its safetensors headers alone. No torch, no weights read.

read_index(directory) ─▶ {tensor name: TensorInfo}      refuses pickles, missing shards, truncated files
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import CheckpointError, StudioError, listed

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1} | {
    "U8": 1,
    "BOOL": 1,
}
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CONFIG_KEYS = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        file: the safetensors file.
        dtype: safetensors' name, e.g. "BF16".
        shape: its dimensions.
        start: absolute offset of its first byte in the file.
        size_bytes: its length.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """One safetensors file's tensors and its metadata.

    Raises:
        CheckpointError: not a safetensors file, or shorter than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= size - 8:
            raise CheckpointError(path, ["not a safetensors file, or cut off inside its header"])
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(path, [f"unreadable safetensors header: {error}"]) from error
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise CheckpointError(path, ["unreadable safetensors header: expected an object of tensors by name"])
    tensors = {name: _info(path, 8 + length, entry) for name, entry in header.items()}
    problems = [problem for name, info in tensors.items() if (problem := _problem(name, info, size))]
    if problems:
        raise CheckpointError(path, problems)
    return tensors, metadata


def _info(path: Path, base: int, entry: Any) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(path, [f"unreadable safetensors header: {error!r}"]) from error
    right = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    if not right or not isinstance(dtype, str):
        raise CheckpointError(path, [f"unreadable safetensors header: {json.dumps(entry)[:200]} is no tensor"])
    return TensorInfo(path, dtype, shape, base + start, end - start)


def _problem(name: str, info: TensorInfo, file_size: int) -> str | None:
    if info.dtype not in DTYPE_BYTES:
        return f"{name}: dtype {info.dtype} is not supported; supported: {', '.join(DTYPE_BYTES)}"
    if info.size_bytes != info.parameters * DTYPE_BYTES[info.dtype]:
        return f"{name}: {info.size_bytes} bytes for shape {info.shape} of {info.dtype}"
    if info.start + info.size_bytes > file_size:
        return f"{name}: ends at byte {info.start + info.size_bytes}, the file has {file_size} (truncated download?)"
    return None


def read_index(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of a model directory, from one `model.safetensors` or from sharded files.

    Raises:
        CheckpointError: no safetensors (pickles are refused), a shard named in the index missing, or a bad header.
    """
    index_file = directory / "model.safetensors.index.json"
    if index_file.exists():
        weight_map = read_json_object(index_file).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(index_file, ["no weight_map from tensor names to shards"])
        files = [directory / Path(name).name for name in sorted(set(weight_map.values()))]
    elif (directory / "model.safetensors").exists():
        files = [directory / "model.safetensors"]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(directory, [_no_safetensors(directory)])
    missing = [f"shard {file.name} is named in {index_file.name} but missing" for file in files if not file.exists()]
    if missing:
        raise CheckpointError(directory, missing)
    index: dict[str, TensorInfo] = {}
    for file in files:
        index.update(read_header(file)[0])
    return index


def check_links(directory: Path, error_class: type[StudioError] = CheckpointError) -> None:
    """Refuses a directory in which a file is a link to somewhere else: such a folder says to read what is not in it.

    The hub's cache, whose snapshots are links into its own blobs, is allowed.

    Raises:
        CheckpointError, or the `error_class` given.
    """
    inside = [directory.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parents[1] / "blobs")
    outside = [
        f"{path.name} is a link to {path.resolve()}, outside of the folder; put the file itself there"
        for path in sorted(directory.iterdir())
        if path.is_symlink() and not any(folder in path.resolve().parents for folder in inside)
    ]
    if outside and error_class is CheckpointError:
        raise CheckpointError(directory, outside)
    if outside:
        raise error_class(listed(f"{directory} holds links to other places", outside))


def _no_safetensors(directory: Path) -> str:
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        return (
            f"only pickle weights found ({', '.join(pickles[:3])}); pickles can run code when opened and are refused. "
            "Convert the model to safetensors first."
        )
    return "no *.safetensors file found; expected a directory with config.json and safetensors weights"


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a model directory.

    Raises:
        CheckpointError: missing, malformed, without the keys that every model has, or of weights quantised already.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(directory, ["config.json is missing; expected a transformers model directory"])
    config = read_json_object(path)
    have = {**config, **text_config(config)}
    if missing := [key for key in CONFIG_KEYS if key not in have]:
        problem = f"{', '.join(missing)} missing; expected the config of a causal language model"
        known = f" of a family in adapters/layouts.py, not {config['model_type']!r}" if "model_type" in config else ""
        raise CheckpointError(path, [problem + known])
    for part in (config, have):
        if part.get("quantization_config"):
            raise CheckpointError(path, [_quantized(part["quantization_config"])])
    return config


CONVERSIONS = {
    "mxfp4": "AutoModelForCausalLM.from_pretrained(path, dtype='bfloat16', "
    "quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(new_path, save_original_format=False)",
    "fp8": "AutoModelForCausalLM.from_pretrained(path, dtype='bfloat16', "
    "quantization_config=FineGrainedFP8Config(dequantize=True)).save_pretrained(new_path, save_original_format=False)",
}
"""How stock transformers turns a quantised checkpoint into a plain one, by quant_method.

In the original format it would write plain values under the names of quantised ones.
"""


def _quantized(found: Any) -> str:
    method = str(found.get("quant_method", "unknown")) if isinstance(found, Mapping) else "unknown"
    usual = "load it dequantised, remove quantization_config from its config, save_pretrained"
    return (
        f"the weights are quantised already ({method}: quantization_config); float32, bfloat16 and float16 weights are "
        "read here, and quantised as the recipe says. Use a published bfloat16 version of the model, or write one with "
        f"stock transformers: {CONVERSIONS.get(method, usual)}"
    )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of config.json: `text_config` where it is multimodal, else all of it."""
    found = config.get("text_config", config)
    return found if isinstance(found, Mapping) else {}


def read_json_object(path: Path, error_class: type[StudioError] = CheckpointError) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError, or the `error_class` given: unreadable, malformed, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _json_error(path, f"cannot be read as JSON: {error}", error_class) from None
    if not isinstance(value, dict):
        raise _json_error(path, "expected a JSON object", error_class)
    return value


def _json_error(path: Path, problem: str, error_class: type[StudioError]) -> StudioError:
    return CheckpointError(path, [problem]) if error_class is CheckpointError else error_class(f"{path}: {problem}")
