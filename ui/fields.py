"""The fields of a recipe's form, read off its JSON Schema, and their way to YAML and back. No gradio here.

schema ──▶ Field …          values in YAML ── shown ──▶ what the form shows ── written ──▶ values in YAML
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from io import StringIO
from typing import Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.constructor import RoundTripConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

import studio

Kind = Literal["switch", "choice", "text"]
FormValue = str | bool | None
Schema = Mapping[str, Any]

ESSENTIAL = {
    "model": ("base", "quantization"),
    "data": ("train", "eval"),
    "adapter": ("attention_rank", "shared_expert_rank", "routed_experts_rank"),
    "placement": (
        "rule",
        "p",
        "fraction",
        "scope",
        "parameters",
        "training_bytes",
        "min_rank",
        "rank_step",
        "max_rank",
        "experts",
    ),
    "training": ("method", "epochs", "learning_rate", "batch_size"),
    "preference": ("beta", "loss_type"),
    "rewards": ("rewards",),
    "sampling": ("completions", "max_new_tokens"),
    "evaluation": ("examples", "generations"),
    "output": ("dir",),
}
"""What is always in sight; every other field is folded, in its section, in the order of the schema."""

ORDER = (
    "model", "data", "training", "preference", "rewards", "sampling", "adapter", "placement", "evaluation", "output",
    "router", "trl",
)  # fmt: skip
"""The sections as the form shows them: what everybody sets first, what hardly anybody does last."""

TITLES = {
    "model.base": "Base model",
    "model.quantization": "Weights in memory",
    "model.double_quant": "Double quantisation",
    "model.int8_experts": "Experts in int8",
    "model.dtype": "Number type",
    "data.train": "Training examples",
    "data.eval": "Held-out examples",
    "data.format": "Format of the rows",
    "data.columns": "Columns, ours: theirs",
    "data.bad_rows": "Bad rows",
    "data.max_length_tokens": "Longest example (tokens)",
    "adapter.dense_mlp_rank": "Dense MLP rank",
    "placement.rule": "Which routed experts",
    "placement.experts": "Expert ids",
    "placement.p": "Share p",
    "placement.fraction": "Fraction of experts",
    "placement.parameters": "Trainable parameters",
    "placement.training_bytes": "Or bytes of memory",
    "placement.min_rank": "Smallest rank",
    "placement.rank_step": "Step between ranks",
    "placement.max_rank": "Largest rank",
    "placement.profile_tokens": "Tokens to profile",
    "router.mode": "Router training",
    "router.rank": "Router rank",
    "router.distill_coef": "Hold to the base",
    "router.load_balance_coef": "Load-balance loss",
    "router.z_loss_coef": "Z-loss",
    "router.watch": "Watch the router",
    "router.probe_examples": "Probe examples",
    "router.warn_kl": "Warn: drift above",
    "router.stop_kl": "Stop: drift above",
    "router.warn_entropy": "Warn: entropy below",
    "router.stop_entropy": "Stop: entropy below",
    "router.warn_busiest": "Warn: busiest above",
    "router.stop_busiest": "Stop: busiest above",
    "training.lr_scheduler": "Learning rate schedule",
    "training.max_grad_norm": "Largest gradient norm",
    "training.max_steps": "Steps, instead of epochs",
    "training.logging_steps": "Steps between loss points",
    "evaluation.examples": "Examples to compare on",
    "evaluation.generations": "Answers to show",
    "evaluation.max_new_tokens": "Longest answer (tokens)",
    "evaluation.json_schema": "JSON Schema of answers",
    "evaluation.every_steps": "Steps between held-out losses",
    "evaluation.tasks": "Tasks of lm-eval",
    "evaluation.task_examples": "Examples of each task",
    "evaluation.task_chat_template": "Tasks in the chat template",
    "sampling.completions": "Completions a prompt",
    "sampling.max_new_tokens": "Longest completion (tokens)",
    "sampling.threshold": "Keep from this reward",
    "sampling.keep": "Kept answers a prompt",
    "trl": "Further TRL options",
    "output.dir": "Job directory",
}
"""Titles where the key alone reads badly."""


@dataclass(frozen=True)
class Field:
    """One field of the form.

    Attributes:
        path: where it stands in the recipe, as "training.epochs"; a top-level field has no section.
        hint: the description in the schema.
        kind: a switch for booleans, a choice for enumerations, text for the rest.
        default: the value where the recipe says nothing.
        choices: what a choice offers.
        nullable: an empty text means null.
        is_text: the value is text and is not read as a number, and as a list only where it opens with a bracket.
        is_list: a list is allowed, so that "0, 3" is read as one.
        switch: the field that decides whether this one is read, "" where it always is. switched_on: its values that do.
    """

    path: str
    hint: str
    kind: Kind
    default: Any
    choices: tuple[str, ...]
    nullable: bool
    is_text: bool
    is_list: bool
    switch: str = ""
    switched_on: tuple[Any, ...] = ()

    @property
    def section(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def title(self) -> str:
        return TITLES.get(self.path, self.name.replace("_", " ").capitalize())

    @property
    def essential(self) -> bool:
        return self.name in ESSENTIAL.get(self.section or self.name, ())

    @property
    def refused_unread(self) -> bool:
        """Whether a value that nothing reads is an error here; a rank that a placement rule passes over is none."""
        sections = ("placement", "router", "preference", "rewards", "sampling")
        return (self.section or self.name) in sections or self.path in ("training.loss_on", "adapter.dense_mlp_rank")

    def is_read(self, values: Mapping[str, FormValue]) -> bool:
        """Whether the recipe reads this field while the form has these values."""
        return not self.switch or values.get(self.switch) in self.switched_on


@dataclass(frozen=True)
class Section:
    """A section of the recipe; a top-level field is one of its own."""

    name: str
    hint: str
    fields: tuple[Field, ...]


@cache
def sections() -> tuple[Section, ...]:
    """The sections of the recipe's schema, in the order of the form."""
    root = studio.recipe_schema()
    found = []
    for name, schema in sorted(root["properties"].items(), key=lambda entry: _place(entry[0])):
        inner = _resolved(schema, root)
        if "properties" in inner:
            own = tuple(_field(f"{name}.{key}", value, root) for key, value in inner["properties"].items())
            hint = schema.get("description", inner.get("description", ""))
            found.append(Section(name, str(hint), own))
        else:
            found.append(Section(name, "", (_field(name, schema, root),)))
    return tuple(found)


def _place(section: str) -> int:
    return ORDER.index(section) if section in ORDER else len(ORDER)


@cache
def fields() -> tuple[Field, ...]:
    """Every field of the form."""
    return tuple(field for section in sections() for field in section.fields)


def shown(document: Mapping[str, Any]) -> dict[str, FormValue]:
    """What the form shows of the YAML mapping `document`, field by field; its defaults where it says nothing."""
    return {field.path: _shown(field, document) for field in fields()}


def unread(values: Mapping[str, FormValue]) -> dict[str, str]:
    """The fields that nothing reads with these values, each with the reason in words."""
    return {
        field.path: f"Not read while {field.switch} is {str(values.get(field.switch)).lower()}."
        for field in fields()
        if not field.is_read(values)
    }


def let_go(before: Mapping[str, FormValue], edits: Mapping[str, FormValue]) -> dict[str, FormValue]:
    """`edits`, and the defaults of the fields that they switch off: a value that nothing reads is an error."""
    defaults, off = shown({}), unread({**before, **edits}).keys() - unread(before).keys() - edits.keys()
    gone = [field.path for field in fields() if field.path in off and field.refused_unread]
    return {**edits, **{path: defaults[path] for path in gone}}


def written(text: str, values: Mapping[str, FormValue]) -> str:
    """The YAML `text` with the form's `values` in it: fields that show the same already stay as they are written.

    Comments and the order of the keys stay. `text` must be a YAML mapping.
    """
    document = load(text)
    before = shown(document)
    changed = [field for field in fields() if values.get(field.path, before[field.path]) != before[field.path]]
    if not changed:
        return text
    for field in changed:
        _section_of(document, field)[field.name] = _value(field, values[field.path])
    return dump(document)


def load(text: str) -> CommentedMap:
    """The YAML mapping `text` with its comments and spellings.

    Raises:
        YAMLError, ValueError: it is no YAML mapping.
    """
    document = _yaml().load(text)
    if not isinstance(document, CommentedMap):
        raise ValueError("not a mapping")
    return document


def dump(document: Any) -> str:
    stream = StringIO()
    _yaml().dump(document, stream)
    return stream.getvalue()


def _yaml() -> YAML:
    yaml = YAML()
    yaml.Constructor, yaml.Representer = _AsSpelled, _NullIsSaid
    yaml.preserve_quotes = True
    yaml.width = 10_000
    return yaml


class _Float(float):
    """A float that remembers its spelling: ruamel's own writes 5.960464477539063e-08 back with another last digit."""

    text: str


class _AsSpelled(RoundTripConstructor):
    """Reads floats as `_Float`."""

    def construct_yaml_float(self, node: ScalarNode) -> _Float:
        value = _Float(super().construct_yaml_float(node))
        value.text = str(node.value)
        return value


_AsSpelled.add_constructor("tag:yaml.org,2002:float", _AsSpelled.construct_yaml_float)


class _NullIsSaid(RoundTripRepresenter):
    """Writes null as `null`, where ruamel writes nothing, and floats as they were spelled."""


_NullIsSaid.add_representer(type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null"))
_NullIsSaid.add_representer(_Float, lambda self, value: self.represent_scalar("tag:yaml.org,2002:float", value.text))


def _field(path: str, schema: Schema, root: Schema) -> Field:
    alternatives = schema.get("anyOf") or schema.get("oneOf")
    options = [_resolved(option, root) for option in alternatives or [schema]]
    types = {option.get("type") for option in options}
    choices = () if alternatives else tuple(schema.get("enum", [schema["const"]] if "const" in schema else []))
    switch, switched_on = next(iter(schema.get("x-read-when", {}).items()), ("", ()))
    return Field(
        path=path,
        hint=" ".join(str(schema.get("description", "")).split()),
        kind="switch" if types == {"boolean"} else "choice" if choices else "text",
        default=schema.get("default", {} if "object" in types else None),
        choices=choices,
        nullable="null" in types,
        is_text=types <= {"string", "null"} or {"string", "array"} <= types,
        is_list="array" in types,
        switch=switch,
        switched_on=tuple(switched_on),
    )


def _resolved(schema: Schema, root: Schema) -> Schema:
    reference = schema.get("$ref")
    return root["$defs"][reference.rsplit("/", 1)[-1]] if reference else schema


def _shown(field: Field, document: Mapping[str, Any]) -> FormValue:
    section = document.get(field.section) if field.section else document
    value = _default(field, section)
    if isinstance(section, Mapping) and field.name in section:
        value = section[field.name]
    if field.kind == "switch":
        return value if isinstance(value, bool) else bool(field.default)
    if field.kind == "choice":
        return value if value in field.choices else None
    return _as_text(value)


def _default(field: Field, section: Any) -> Any:
    """As the Recipe has it: max_steps alone takes the place of epochs."""
    if field.path == "training.epochs" and isinstance(section, Mapping) and section.get("max_steps") is not None:
        return None
    return field.default


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, dict | list):
        return _flow(value)
    return dump(value).removesuffix("...\n").strip()


def _flow(value: Any) -> str:
    """A list or mapping on one line."""
    yaml, stream = _yaml(), StringIO()
    yaml.default_flow_style = True
    yaml.dump(_plain(value), stream)
    return stream.getvalue().strip()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, _Float) else value


def _section_of(document: CommentedMap, field: Field) -> CommentedMap:
    if not field.section:
        return document
    if not isinstance(document.get(field.section), CommentedMap):
        document[field.section] = CommentedMap()
    section: CommentedMap = document[field.section]
    return section


def _value(field: Field, shown_value: FormValue) -> Any:
    """What the form shows as a value for YAML; text that is no number or list stays text, for the schema to refuse."""
    if not isinstance(shown_value, str) or field.kind != "text":
        return shown_value
    text = shown_value.strip()
    if not text:
        return _nothing(field)
    if field.is_text and not (field.is_list and text.startswith("[")):
        return text
    if field.is_list and text[0].isdigit():
        text = f"[{text}]"
    try:
        value = _yaml().load(text)
    except (YAMLError, ValueError):
        return text
    return text if value is None and text.lower() not in ("null", "~") else value


def _nothing(field: Field) -> Any:
    """What an emptied text means: nothing of its kind where that is the default, else null, else an empty text."""
    if field.default in ({}, []):
        return type(field.default)()
    return "" if field.is_text and not field.nullable else None
