"""What every trainer does alike: TRL's common options, a loss that must be finite, the report to the job, the end.

class _Trainer(StudioTrainer, SFTTrainer): ...          StudioTrainer comes first: it wraps TRL's own steps
finish(_Trainer(model=…, args=XConfig(**options(recipe, job, …)), callbacks=callbacks(…)))
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapters.lora import RATE_RATIO
from studio.data import held_out_rows
from studio.defaults import settled_learning_rate
from studio.errors import TrainingError
from studio.evaluation import held_out_loss
from studio.jobs import Job
from studio.lr_test import Ramp, Smoother, is_lr_test, read_ramp
from studio.models import compute_dtype
from studio.recipe import Recipe
from studio.trainers.router import RouterWatch, WatchesRouter

STEP_SECONDS = 0.5
"""How often the step in state.json is brought up to date; each time is a write that reaches the disk."""

SCHEDULES = {"constant": "constant_with_warmup"}
"""`training.lr_scheduler` → transformers' name, where that is another: its "constant" passes over the warm-up."""

LOGGED = ("loss", "learning_rate", "grad_norm", "epoch", "mean_token_accuracy", "entropy")
"""What is kept of each line that Trainer logs; a method may name more."""


def options(recipe: Recipe, job: Job, **method: Any) -> dict[str, Any]:
    """TRL's options as the recipe says them, then those of one `method`, then the recipe's section `trl`."""
    training, on_gpu = recipe.training, torch.cuda.is_available()
    planned = order_options(recipe, job) if recipe.data.ordered else {}
    ours: dict[str, Any] = {
        "output_dir": str(job.path / "checkpoints"),
        "max_steps": training.max_steps or -1,
        "num_train_epochs": training.epochs or 1.0,
        "per_device_train_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "learning_rate": settled_learning_rate(recipe),
        "lr_scheduler_type": SCHEDULES.get(training.lr_scheduler, training.lr_scheduler),
        "warmup_steps": training.warmup_fraction,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "gradient_checkpointing": training.gradient_checkpointing,
        "seed": training.seed,
        "logging_steps": training.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not on_gpu,
        "bf16": on_gpu and compute_dtype(recipe.model.dtype) == "bfloat16",
        "dataloader_pin_memory": on_gpu,
        **planned,
    }
    if recipe.adapter.dropout and training.method not in ("sft", "rejection"):
        ours["disable_dropout"] = False  # else TRL's preference trainers would set that of the adapter to 0
    return {**ours, **method, **recipe.trl}


IN_ORDER = "sequential"
"""TRL's `train_sampling_strategy` that reads rows front to back."""


def order_options(recipe: Recipe, job: Job) -> dict[str, Any]:
    """TRL's options for rows whose order was planned: they are read once, front to back, by the plan's steps.

    With packing the plan does not know the steps; then the planned rows are one epoch, in TRL's packs.
    """
    if recipe.data.streaming:
        return {"max_steps": recipe.training.max_steps}
    if recipe.trl.get("packing"):
        return {"num_train_epochs": 1.0}
    return {"train_sampling_strategy": IN_ORDER, "max_steps": job.plan().total_steps}


class StudioTrainer(WatchesRouter):
    """Mixed into a TRL trainer: losses on the routing, rows in the planned order, and a stop at the first loss that is
    not finite.

    Trainer would log such a loss as 0.0, go on and save a NaN adapter.
    """

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Rows in their order where that was planned; trainers that repeat prompts have their own switch for it."""
        if self.args.train_sampling_strategy != IN_ORDER:  # type: ignore[attr-defined]
            return super()._get_train_sampler(*args, **kwargs)  # type: ignore[misc]
        if hasattr(self, "shuffle_dataset"):
            vars(self)["shuffle_dataset"] = False
            return super()._get_train_sampler(*args, **kwargs)  # type: ignore[misc]
        return SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]  # of the TRL trainer beside it
        if not torch.isfinite(loss).all():
            step = self.state.global_step + 1  # type: ignore[attr-defined]
            raise TrainingError(
                f"the loss became {loss.item()} at step {step}: training stopped and no adapter was written. "
                f"A learning rate lower than {self.args.learning_rate:g} usually helps"  # type: ignore[attr-defined]
            )
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The trainer's own optimizer, each parameter at its own rate (`adapters.lora.set_lora_plus`)."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        split_by_rate(optimizer)
        return optimizer


def split_by_rate(optimizer: torch.optim.Optimizer) -> None:
    """Moves parameters with a ratio of their own into groups of that many times the learning rate.

    Before a step and before the scheduler, which multiplies each group's rate; done again, it changes nothing.
    """
    for group in list(optimizer.param_groups):
        at: dict[float, list[torch.nn.Parameter]] = {}
        for parameter in group["params"] if "rate_ratio" not in group else ():
            at.setdefault(getattr(parameter, RATE_RATIO, 1.0), []).append(parameter)
        others = {ratio: parameters for ratio, parameters in at.items() if ratio != 1}
        if others:
            group["params"] = at.get(1.0, [])
        for ratio, parameters in others.items():
            split = {**group, "params": parameters, "lr": group["lr"] * ratio, "rate_ratio": ratio}
            optimizer.param_groups.append(split)


def callbacks(
    recipe: Recipe, job: Job, watch: RouterWatch | None, logged: tuple[str, ...] = ()
) -> list[TrainerCallback]:
    """The report to the job and, where there is one, the watch over the routing; `logged`: metrics of the method."""
    held_out = [HeldOutLoss(recipe, job)] if recipe.evaluation.every_steps else []
    test = [RangeTest.of(job)] if is_lr_test(job) else []
    return [Report(job, (*LOGGED, *logged)), *([watch] if watch else []), *held_out, *test]


def finish(trainer: Trainer) -> dict[str, Any]:
    """Trains to the end.

    Returns:
        {"steps": optimizer steps done, "loss": mean training loss}.

    Raises:
        TrainingError: the loss or a weight became NaN or infinite, or the routing passed a limit of the recipe.
    """
    outcome = trainer.train()
    assert trainer.model is not None
    if not all(torch.isfinite(p).all() for p in trainer.model.parameters() if p.requires_grad):
        raise TrainingError(f"the adapter holds NaN or infinity after step {outcome.global_step}; it was not written")
    return {"steps": outcome.global_step, "loss": outcome.training_loss}


class Report(TrainerCallback):
    """Writes what Trainer logs into the job's metrics.jsonl, and the step into its state.

    Args:
        names: of the logged values that are kept; a slash in TRL's name becomes an underscore.
    """

    def __init__(self, job: Job, names: tuple[str, ...]):
        self.job, self.names = job, names
        self.last = (time.monotonic(), 0)
        self.shown = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.last = (time.monotonic(), 0)
        self.job.update(phase="training", step=0, total_steps=state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        tokens, now = int(logs.get("num_tokens", 0)), time.monotonic()
        rate = (tokens - self.last[1]) / max(now - self.last[0], 1e-9)
        self.last = (now, tokens)
        row = {name.replace("/", "_"): float(logs[name]) for name in self.names if name in logs}
        self.job.log_metrics(
            {"kind": "train", "step": state.global_step, **row, "tokens_per_second": rate, "time": time.time()}
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if time.monotonic() - self.shown >= STEP_SECONDS:
            self.shown = time.monotonic()
            self.job.update(step=state.global_step)


class HeldOutLoss(TrainerCallback):
    """The held-out loss every `evaluation.every_steps` steps: rows "held_out" in metrics.jsonl.

    A sweep prunes by them.
    """

    def __init__(self, recipe: Recipe, job: Job):
        self.recipe, self.job, self.every = recipe, job, recipe.evaluation.every_steps or 1
        self.rows = held_out_rows(recipe)[: recipe.evaluation.examples]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            loss = held_out_loss(
                kwargs["model"],
                kwargs["processing_class"],
                self.rows,
                max_length_tokens=self.recipe.data.max_length_tokens,
                batch_size=self.recipe.training.batch_size,
                loss_on=self.recipe.training.loss_on,
            )
            self.job.log_metrics({"kind": "held_out", "step": state.global_step, "loss": loss})


class RangeTest(TrainerCallback):
    """Raises the learning rate along a ramp, and ends the training once the loss is far above its least."""

    def __init__(self, job: Job, ramp: Ramp):
        self.job, self.ramp = job, ramp
        self.smooth = Smoother()
        self.rate = ramp.start

    @classmethod
    def of(cls, job: Job) -> RangeTest:
        return cls(job, read_ramp(job.path))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.rate = self.ramp.rate(state.global_step)
        for group in kwargs["optimizer"].param_groups:  # a method may give groups rates of their own, by a factor
            group["lr"] = self.rate * group.get("initial_lr", args.learning_rate) / args.learning_rate

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.job.log_metrics(
                {"kind": "lr_test", "step": state.global_step, "rate": self.rate, "loss": logs["loss"]}
            )
            if self.smooth.has_diverged(float(logs["loss"])):
                control.should_training_stop = True
