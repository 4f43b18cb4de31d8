"""What a recipe says of the training: its steps, and what single methods read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    JsonValue,
    field_validator,
    model_validator,
)

from studio.errors import RewardError
from studio.recipe_parts import InputPath, Settings
from studio.recipe_parts import refusal as _refusal
from studio.rewards import REWARDS, unknown_option

Rate = Annotated[float, Field(gt=0, le=1)]


class TrainingSettings(Settings):
    """How the adapter is trained."""

    method: Literal["sft", "dpo", "kto", "orpo", "cpo", "reward", "grpo", "rloo", "rejection"] = "sft"
    """sft: supervised fine-tuning, on conversations or plain text. From preference pairs: dpo, orpo, cpo (also SimPO),
    and reward, which trains a reward model. kto: from completions labelled as wanted or not, or pairs. grpo, rloo:
    learn from `rewards` of completions that the model writes. rejection: sft on the best of them."""

    epochs: float | None = Field(default=3.0, gt=0, le=1000)
    """Passes over the training examples. null where max_steps is set."""

    max_steps: int | None = Field(default=None, ge=1, le=100_000_000)
    """Train for exactly this many optimizer steps. null: as `epochs` says. Only one of the two is set."""

    batch_size: int = Field(default=16, ge=1, le=4096)
    """Examples per forward pass. Memory for activations grows with it."""

    gradient_accumulation_steps: int = Field(default=1, ge=1, le=4096)
    """Forward passes per optimizer step. The effective batch is batch_size times this."""

    learning_rate: Rate | Literal["auto"] = 2e-4
    """Highest learning rate, reached after the warm-up. auto: what `studio suggest` says."""

    lr_scheduler: Literal["linear", "cosine", "constant"] = "cosine"
    """How the learning rate goes on after the warm-up: falls linearly, along a cosine, or stays constant."""

    warmup_fraction: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""

    lora_plus_ratio: float = Field(default=1.0, ge=1, le=1024)
    """Learning rate of the B factors over that of the A factors (LoRA+, whose paper finds 16 good). 1: the same."""

    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """AdamW's weight decay on the adapter."""

    max_grad_norm: float = Field(default=1.0, ge=0, le=1000)
    """Gradients are scaled down to this norm. 0: never."""

    loss_on: Literal["completion", "assistant", "all"] = "completion"
    """What sft learns, and the held-out loss is of: the completion, every turn of the assistant, or all tokens. Plain
    text is learned whole."""

    expert_path: Literal["auto", "fast", "lean"] = "auto"
    """fast keeps the experts' activations, lean computes them again (less memory). auto: fast where it fits."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seed of the data order and of the adapter's start."""

    logging_steps: int = Field(default=5, ge=1, le=100_000)
    """Optimizer steps between two points of the loss curve."""

    @model_validator(mode="before")
    @classmethod
    def _max_steps_alone_clears_epochs(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("max_steps") is not None and "epochs" not in values:
            return {**values, "epochs": None}
        return values

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.max_steps is None):
            both = "both are" if self.epochs is not None else "neither is"
            raise _refusal(f"{both} set: give either epochs or max_steps, and null for the other")
        return self


class PreferenceSettings(Settings):
    """What the preference methods share; everything else of a method is in `trl`."""

    beta: float = Field(default=0.1, gt=0, le=1000)
    """How strongly the policy is held to the reference (dpo, kto), or the weight of the odds ratio (orpo)."""

    loss_type: tuple[str, ...] = ()
    """Losses of the method, such as [sigmoid] or [sigmoid, sft] for dpo; only dpo takes several. []: its usual one."""

    loss_weights: tuple[float, ...] = ()
    """Weights of several losses of dpo, one for each. []: 1 for each."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the pairs that are taken to be the wrong way round. Not every loss reads it."""

    @field_validator("loss_type", "loss_weights", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return (value,)
        return tuple(value) if isinstance(value, list) else value


class RewardSettings(Settings):
    """One reward: a function, its weight, and the options that this function reads."""

    function: Literal[
        "exact_match", "json_fields", "json_schema", "regex", "code", "length", "thinking", "reward_model"
    ]
    """exact_match, json_fields: against the reference. json_schema, regex: the answer's form. code: the answer's
    program runs, or passes the row's tests. length: not too long. thinking: first thinks, then answers. reward_model:
    a trained one."""

    weight: float = Field(default=1.0, ge=-1000, le=1000)
    """The total reward is the sum of the rewards times their weights. Negative: a penalty."""

    normalise: Literal["ends", "lenient", "json"] = "ends"
    """What exact_match passes over: white space at the ends; also case, spacing and punctuation; or compare as JSON."""

    json_schema: InputPath | dict[str, JsonValue] | None = None
    """A JSON Schema, or the path of its file. A relative path starts at the recipe file."""

    pattern: str | None = None
    """Python regular expression that regex looks for."""

    part: Literal["answer", "completion"] = "answer"
    """Where regex looks: in what comes after the thinking, or in all of the completion."""

    tests: tuple[str, ...] = ()
    """Python statements that the program of every answer must survive for code, beside those of its row."""

    timeout_seconds: float = Field(default=2.0, gt=0, le=600)
    """Longest that code may run, for each test."""

    memory_bytes: int = Field(default=2**29, ge=2**26, le=2**40)
    """Most address space that code may use."""

    longest_characters: int | None = Field(default=None, ge=1)
    """Answers up to here get the full reward of length."""

    job: InputPath | None = None
    """Job directory of a trained reward model, or its merged model. A relative path starts at the recipe file."""

    @field_validator("tests", mode="before")
    @classmethod
    def _tests_are_statements(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and any(not isinstance(test, str) or not test.strip() for test in value):
            raise _refusal("is a list of Python statements, such as [assert callable(f)]")
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _the_function_reads_what_is_given(self) -> Self:
        if not self.weight:
            raise _refusal("weight is 0: the reward would count for nothing; leave it out")
        if problem := unknown_option(self):
            raise _refusal(problem)
        try:
            if self.function != "reward_model" and not isinstance(self.json_schema, Path):
                REWARDS[self.function].build(self)
        except re.error as error:
            raise _refusal(f"pattern is no regular expression: {error}") from None
        except RewardError as error:
            raise _refusal(f"{self.function}: {error}") from None
        return self


class SamplingSettings(Settings):
    """How completions are drawn from the model, to be rewarded."""

    completions: int = Field(default=8, ge=2, le=1024)
    """Completions of each prompt. They are compared with each other."""

    temperature: float = Field(default=1.0, gt=0, le=10)
    """Of the sampling: below 1 the likely tokens become likelier."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the most likely tokens that make up this probability alone."""

    max_new_tokens: int = Field(default=128, ge=1, le=1_048_576)
    """Longest completion to draw, in tokens."""

    threshold: float = 1.0
    """rejection keeps completions whose total reward is at least this."""

    keep: int = Field(default=1, ge=1, le=1024)
    """Most different completions of a prompt that rejection keeps, the best first."""

    rounds: int = Field(default=1, ge=1, le=100)
    """How often rejection samples anew, from the model as trained so far, and trains on what it kept."""
