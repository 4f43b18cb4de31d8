"""Files that others wrote, wrong in type: each is an error of ours, none a traceback."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapters.adapter_files import CONFIG, WEIGHTS, read_adapter
from adapters.checkpoint import read_header
from adapters.errors import AdapterFileError, CheckpointError
from adapters.layouts import LAYOUTS
from adapters.sidecar import SIDECAR, read_sidecar

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
RIGHT = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "peft_version": "0.19.1"}
SIDECAR_RIGHT = {
    "version": 1,
    "format": "peft",
    "base_name": "tiny",
    "base": None,
    "held": None,
    "peft_version": "0.19.1",
    "model_type": "qwen3_moe",
    "experts": {},
    "made_for": ["peft"],
    "ignored_by": [],
}


def adapter(directory: Path, **options: Any) -> Path:
    factors = {f"{PREFIX}.lora_A.weight": torch.ones(2, 8), f"{PREFIX}.lora_B.weight": torch.ones(8, 2)}
    save_file(factors, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(RIGHT | options))
    return directory


def test_a_right_config_is_read(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"k_proj": 4}, "alpha_pattern": {}, "lora_alpha": 0.5, "target_modules": ".*q_proj"}
    assert len(read_adapter(adapter(tmp_path, **patterns), LAYOUTS["qwen3_moe"]).linear) == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("r", 0),
        ("r", -4),
        ("r", "8"),
        ("r", True),
        ("r", None),
        ("lora_alpha", None),
        ("lora_alpha", "16"),
        ("lora_alpha", float("nan")),
        ("rank_pattern", {"q_proj": "four"}),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj[": 4}),
        ("alpha_pattern", {"q_proj": None}),
        ("target_parameters", [1]),
        ("target_parameters", "experts.down_proj"),
        ("target_modules", [None]),
        ("target_modules", "q_proj("),
        ("exclude_modules", {"q_proj": 1}),
        ("layers_to_transform", "all"),
        ("peft_version", 5),
    ],
)
def test_an_option_of_the_wrong_type_is_named(tmp_path: Path, option: str, value: Any) -> None:
    with pytest.raises(AdapterFileError, match=rf"{option} is "):
        read_adapter(adapter(tmp_path, **{option: value}), LAYOUTS["qwen3_moe"])


@pytest.mark.parametrize(
    "header",
    [
        [1, 2],
        {"a": 5},
        {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}},
        {"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}},
        {"__metadata__": [1]},
    ],
    ids=str,
)
def test_a_header_of_the_wrong_types_is_refused(tmp_path: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(CheckpointError, match="header"):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base", "tiny"),
        ("base", ["weights"]),
        ("held", "nf4"),
        ("held", [1]),
        ("experts", 4),
        ("base_name", None),
        ("peft_version", 5),
        ("made_for", "peft"),
        ("ignored_by", [1]),
        ("ignored_by", 1),
    ],
)
def test_a_sidecar_with_a_field_of_the_wrong_type_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    (tmp_path / SIDECAR).write_text(json.dumps(SIDECAR_RIGHT))
    assert read_sidecar(tmp_path) is not None
    (tmp_path / SIDECAR).write_text(json.dumps(SIDECAR_RIGHT | {field: value}))
    with pytest.raises(AdapterFileError, match=rf"no whole sidecar: {field} is "):
        read_sidecar(tmp_path)
