"""The values of adapter_config.json, by type: what others wrote may hold anything."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def wrong_values(config: Mapping[str, Any]) -> Iterator[str]:
    """Each option that is not what PEFT writes there, and what that would be."""
    for name, (right, wanted) in OPTIONS.items():
        if name in config and not right(config[name]):
            yield f"{name} is {config[name]!r}, expected {wanted}"


def _rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _layers(value: Any) -> bool:
    return value is None or all(type(each) is int for each in (value if isinstance(value, list) else [value]))


def _strings(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def _modules(value: Any) -> bool:
    return _is_pattern(value) or _strings(value)


def _is_pattern(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _by_pattern(right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        if not isinstance(value, dict):
            return value is None
        return all(_is_pattern(pattern) and right(each) for pattern, each in value.items())

    return check


OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_rank, "a whole number from 1 on"),
    "lora_alpha": (_number, "a number"),
    "rank_pattern": (_by_pattern(_rank), "whole numbers from 1 on by regular expressions of names"),
    "alpha_pattern": (_by_pattern(_number), "numbers by regular expressions of names"),
    "target_modules": (_modules, "a list of names or a regular expression"),
    "exclude_modules": (_modules, "a list of names or a regular expression"),
    "target_parameters": (_strings, "a list of names"),
    "layers_to_transform": (_layers, "a layer's number or a list of them"),
    "peft_version": (lambda value: value is None or isinstance(value, str), "a version as text"),
    "base_model_name_or_path": (lambda value: value is None or isinstance(value, str), "a name"),
}
