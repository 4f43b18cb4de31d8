"""The options that a recipe may pass through to TRL under `trl:`, checked without importing TRL.

The names and annotations of the method's class and its parents are read from the installed source with `ast`:
importing TRL costs seconds and loads torch, and a recipe must validate within one.
"""

from __future__ import annotations

import ast
import importlib.util
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from studio.methods import METHODS
from studio.recipe_text import describe

CONFIG_SOURCES = (  # (top-level package, file inside it, class): parents first, then the method's own
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
)

RECIPE_FIELDS = {  # TRL name -> the recipe field that owns it
    "learning_rate": "training.learning_rate",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "per_device_train_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "lr_scheduler_type": "training.lr_scheduler",
    "warmup_steps": "training.warmup_fraction",
    "warmup_ratio": "training.warmup_fraction",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.max_grad_norm",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "activation_checkpointing": "training.gradient_checkpointing",
    "completion_only_loss": "training.loss_on",
    "assistant_only_loss": "training.loss_on",
    "seed": "training.seed",
    "logging_steps": "training.logging_steps",
    "logging_strategy": "training.logging_steps",
    "max_length": "data.max_length_tokens",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "output_dir": "output.dir",
    "router_aux_loss_coef": "router.load_balance_coef",
}

SAMPLING_FIELDS = {  # owned by the section sampling, where the method samples
    "num_generations": "sampling.completions",
    "max_completion_length": "sampling.max_new_tokens",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
}

PREFERENCE_FIELDS = {  # owned by the section preference, where the method reads them there
    "beta": "preference.beta",
    "loss_type": "preference.loss_type",
    "loss_weights": "preference.loss_weights",
    "label_smoothing": "preference.label_smoothing",
}

REASONS = {  # TRL name, or prefix ending in "*" -> why a recipe may not set it
    "padding_free": "it mixes the rows of a batch without flash attention; write packing: true",
    "truncation_mode": "the studio cuts examples at their end, see data.max_length_tokens",
    "max_completion_length": "the studio cuts examples at their end, see data.max_length_tokens",
    "padding_value": "the tokenizer is the base model's own",
    "pad_token": "the tokenizer is the base model's own",
    "eos_token": "the tokenizer is the base model's own",
    "is_encoder_decoder": "the studio trains decoders",
    "generate_during_eval": "the studio evaluates before and after training, see the section evaluation",
    "sync_ref_model": "the reference is the base model, with the adapters off",
    "ref_model_*": "the reference is the base model, with the adapters off",
    "train_sampling_strategy": "the studio reads and prepares the data, see the section data",
    "trust_remote_code": "the studio never runs code that ships with a model",
    "model_init_kwargs": "the studio loads the base itself, see the section model",
    "push_to_hub": "the studio uploads nothing",
    "hub_*": "the studio uploads nothing, and a recipe holds no tokens",
    "report_to": "metrics go to the job directory and nowhere else",
    "run_name": "metrics go to the job directory and nowhere else",
    "project": "metrics go to the job directory and nowhere else",
    "trackio_*": "metrics go to the job directory and nowhere else",
    "logging_nan_inf_filter": "a loss that is not finite stops the job",
    "dataset_*": "the studio reads and prepares the data, see the section data",
    "chat_template_path": "the chat template is the base model's own",
    "remove_unused_columns": "the studio reads and prepares the data, see the section data",
    "label_names": "the studio reads and prepares the data, see the section data",
    "do_*": "the studio trains once and evaluates before and after, see the section evaluation",
    "eval_*": "the studio evaluates before and after training, see the section evaluation",
    "reward_weights": "each entry of the section rewards has its own weight",
    "num_generations_eval": "the studio evaluates before and after training, see the section evaluation",
    "use_vllm": "completions come from the model in training itself",
    "vllm_*": "completions come from the model in training itself",
    "use_transformers_*": "completions come from the model in training itself",
    "transformers_*": "completions come from the model in training itself",
    "log_completions*": "sampled completions are written to the job directory",
    "log_multimodal": "sampled completions are written to the job directory",
    "log_unique_prompts": "sampled completions are written to the job directory",
    "num_completions_to_print": "sampled completions are written to the job directory",
    "load_best_model_at_end": "the studio evaluates before and after training, see the section evaluation",
    "use_cpu": "the device is chosen from what the machine has",
    "local_rank": "a job is one process on one device",
    "ddp_*": "a job is one process on one device",
    "fsdp*": "a job is one process on one device",
    "deepspeed": "a job is one process on one device",
    "parallelism_config": "a job is one process on one device",
    "accelerator_config": "a job is one process on one device",
    "auto_find_batch_size": "the plan holds for the batch size it was made with",
    "resume_from_checkpoint": "a job starts from its base model",
    "save_*": "a job writes its adapter at the end; checkpoints and resume are not there yet",
}

SIMPLE_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "None": (type(None),),
    "dict": (dict,),
    "list": (list,),
}


def trl_problem(name: str, value: Any, method: str = "sft") -> str | None:
    """What is wrong with setting TRL's option `name` to `value` in a recipe of this training method, or None."""
    if name in RECIPE_FIELDS:
        return f"the recipe has its own field for this, set {RECIPE_FIELDS[name]}"
    if field := _of_method(name, method):
        return f"the recipe has its own field for this, set {field}"
    if reason := _reason(name):
        return f"cannot be set: {reason}"
    if (name, value) == ("packing_strategy", "wrapped"):
        return "wrapped is refused: it cuts examples and lets them see each other; allowed: bfd, bfd_split"
    options = trl_options(method)
    if name not in options:
        near = get_close_matches(name, [option for option in options if not _reason(option)], n=1)
        return f"TRL's {METHODS[method].config[1]} has no such option" + (
            f'; did you mean "{near[0]}"?' if near else ""
        )
    return _type_problem(value, options[name])


def _of_method(name: str, method: str) -> str | None:
    """The recipe field that owns the option `name` of this method's class."""
    if METHODS[method].samples and name in SAMPLING_FIELDS:
        return SAMPLING_FIELDS[name]
    return PREFERENCE_FIELDS.get(name) if name in METHODS[method].reads else None


@cache
def trl_options(method: str) -> dict[str, str]:
    """Every field of the method's class of options with its annotation as text, from the source that is installed."""
    options: dict[str, str] = {}
    for package, file, class_name in (*CONFIG_SOURCES, ("trl", *METHODS[method].config)):
        options.update(_annotated_names(_package_folder(package) / file, class_name))
    return options


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # a top-level name: finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed: run make quickstart, or pip install {package}")
    return Path(spec.submodule_search_locations[0])


def _annotated_names(path: Path, class_name: str) -> dict[str, str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            return {f.target.id: ast.unparse(f.annotation) for f in fields if isinstance(f.target, ast.Name)}
    raise LookupError(f"{path} defines no class {class_name}: this version of the package is not supported")


def _reason(name: str) -> str | None:
    for pattern, reason in REASONS.items():
        if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])):
            return reason
    return None


def _type_problem(value: Any, annotation: str) -> str | None:
    """Checks annotations made of plain types alone; TRL itself checks the others when the job starts."""
    names = [part.strip().split("[")[0] for part in annotation.split("|")]
    if "," in annotation or any(name not in SIMPLE_TYPES for name in names):
        return None
    allowed = tuple(kind for name in names for kind in SIMPLE_TYPES[name])
    if isinstance(value, allowed) and not (isinstance(value, bool) and bool not in allowed):
        return None
    return f"received {describe(value)}, TRL allows {' or '.join('null' if n == 'None' else n for n in names)}"
