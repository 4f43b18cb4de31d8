"""Training with the routers in view: losses on the routing, what it does meanwhile, and rules that warn or stop.

    watch_router(model, tokenizer, recipe, rows, job) ─▶ RouterWatch | None
    WatchesRouter    mixed into a TRL trainer: adds the recipe's losses, shows each forward pass to the watch
    RouterWatch      one row a logging step in metrics.jsonl, and one for the steps after the last; then the rules

A row, lists by MoE layer, over the tokens since the last row (padding aside):
    {"kind": "router", "step": n, "tokens": n, "layers": [decoder layer numbers],
     "load_entropy": [of the experts' load over log E: 1 is even use, log K / log E is K experts for all],
     "busiest": [share of the tokens that the busiest expert got], "dead": [experts without a token],
     "kl": [KL(base || now) in nats a token, of the routing on the probe set],
     and the mean of each loss that is on: "load_balance_loss", "z_loss", "distill_loss"}
The probe set is the same few examples each time; the base's routing of them is taken once, before the first step. Its
drift is that of the model after step n; the counts are of the forward passes that led there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from adapters.layouts import ExpertLayout, layout_for
from adapters.lora import expert_count
from adapters.router_losses import Scoring, distillation_loss, load_balance_loss, routing_kl, z_loss
from adapters.router_profile import relative_entropy
from adapters.routing import Routing, watch_routing
from studio.data import Row, held_out_rows, sequences
from studio.encoding import encode
from studio.errors import TrainingError
from studio.evaluation import decoder_and_head
from studio.jobs import Job
from studio.placing import check_router
from studio.recipe import Recipe
from studio.recipe_model import RouterSettings

PROBE_TOKENS = 2048
"""Most tokens of the probe set, and most positions of one of its forward passes: it runs at every logging step."""

Batch = tuple[Tensor, Tensor]
"""(ids, mask), both (rows, length) int64, padded on the right."""

Pass = tuple[Sequence[Routing], Tensor | None]
"""The routing of one forward pass, layer by layer, and its mask, (rows, length), 0 for padding; None: there is none."""

LOSSES: dict[str, Callable[[Sequence[Routing], Tensor, Scoring], Tensor]] = {
    "load_balance": load_balance_loss,
    "z_loss": lambda seen, kept, _: z_loss(seen, kept),
    "distill": distillation_loss,
}
"""`router.<name>_coef` → the loss that it weighs."""

RULES: dict[str, tuple[str, int, str]] = {
    "kl": ("kl", 1, "the routing of the probe set is {:.3g} nats (KL) from the base's, above"),
    "entropy": ("load_entropy", -1, "the relative load entropy of the experts is {:.3g}, below"),
    "busiest": ("busiest", 1, "the busiest expert got {:.3g} of the tokens, above"),
}
"""`router.warn_<name>` and `router.stop_<name>` → the row's key, 1 for a most and -1 for a least, and what is said."""


def watch_router(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, rows: Sequence[Row], job: Job
) -> RouterWatch | None:
    """What the recipe's section `router` asks for of this model; None where that is nothing.

    Args:
        rows: of the training file; the probe set is taken from them where the recipe has no held-out file.

    Raises:
        TargetError: it asks for something that this model cannot have.
    """
    settings, layout = recipe.router, layout_for(model.config.model_type)
    check_router(settings, layout, expert_count(model, layout), model.config.to_dict())
    coefs = {name: found for name in LOSSES if (found := getattr(settings, f"{name}_coef"))}
    if not layout.has_experts or not (settings.watch or coefs):
        return None
    probe: list[Batch] = []
    if settings.watch:
        probed = sequences((held_out_rows(recipe) or rows)[: settings.probe_examples])
        encoded = (encode(tokenizer, row, recipe.data.max_length_tokens)[0] for row in probed)
        probe = probe_batches(encoded, int(tokenizer.pad_token_id), model.device)
    return RouterWatch(model, layout, settings, coefs, probe, job)


def probe_batches(encoded: Any, pad_id: int, device: torch.device) -> list[Batch]:
    """The rows of token ids in order, as long as they fill `PROBE_TOKENS`, as padded batches of similar lengths."""
    rows: list[list[int]] = []
    for row in encoded:
        rows.append(row[: PROBE_TOKENS - sum(map(len, rows))])
    batches: list[list[list[int]]] = []
    for row in sorted((row for row in rows if row), key=len):
        if batches and (len(batches[-1]) + 1) * len(row) <= PROBE_TOKENS:
            batches[-1].append(row)
        else:
            batches.append([row])
    return [_padded(batch, pad_id, device) for batch in batches]


def _padded(rows: list[list[int]], pad_id: int, device: torch.device) -> Batch:
    longest = max(map(len, rows))
    ids = [row + [pad_id] * (longest - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class RouterWatch(TrainerCallback):
    """Sums of the routing since the last row; one row a logging step, and one at the end.

    Args:
        coefs: weight of each loss of `LOSSES` that is on.
        probe: the probe set, empty where nothing is watched.
    """

    def __init__(
        self,
        model: PeftModel,
        layout: ExpertLayout,
        settings: RouterSettings,
        coefs: dict[str, float],
        probe: list[Batch],
        job: Job,
    ):
        self.model, self.layout, self.settings, self.coefs, self.probe, self.job = (
            model, layout, settings, coefs, probe, job
        )  # fmt: skip
        self.base: list[list[Tensor]] = []
        self.warned: set[tuple[str, int]] = set()
        """(rule, position of the layer) that the last row was past."""
        self._begin_window()

    def _begin_window(self) -> None:
        self.layers: list[int] = []
        self.counts: list[Tensor] = []
        self.tokens: Tensor | int = 0
        self.passes = 0
        self.sums: dict[str, Tensor | float] = dict.fromkeys(self.coefs, 0.0)

    @contextmanager
    def routing(self) -> Iterator[list[Pass]]:
        """Yields a list that each forward pass with gradients extends.

        Passes without gradients are not the policy learning: a reference's, the mismatched rows from which KTO
        estimates the KL, the second one that TRL makes for label smoothing.
        """
        passes: list[Pass] = []
        with watch_routing(self.model, self.layout, base="distill" in self.coefs) as seen:

            def after(_decoder: Any, _args: Any, inputs: dict[str, Any], _output: Any) -> None:
                if torch.is_grad_enabled():
                    passes.append((list(seen), inputs.get("attention_mask")))
                seen.clear()

            handle = decoder_and_head(self.model)[0].register_forward_hook(after, with_kwargs=True)
            try:
                yield passes
            finally:
                handle.remove()

    def take(self, passes: Sequence[Pass], real: Tensor | None = None) -> Tensor | float:
        """Counts the forward passes; returns what they add to the loss.

        Args:
            passes: what `routing` saw.
            real: (rows, length), 0 for padding, where the passes have no mask that says so.

        Raises:
            TrainingError: a loss is on and could not reach the routers.
        """
        return sum((self._take(seen, real if mask is None else mask) for seen, mask in passes), start=0.0) / len(passes)

    def _take(self, seen: Sequence[Routing], mask: Tensor | None) -> Tensor | float:
        kept = torch.ones_like(seen[0].logits[:, 0], dtype=torch.bool) if mask is None else mask.flatten().bool()
        self._count(seen, kept)
        if self.coefs and not all(routing.logits.requires_grad for routing in seen):
            raise TrainingError(
                "the losses on the routing have no gradient: gradient checkpointing runs with use_reentrant; leave "
                "use_reentrant out of trl.gradient_checkpointing_kwargs, or set it to false"
            )
        losses = {name: LOSSES[name](seen, kept, self.layout.scoring) for name in self.coefs}
        for name, loss in losses.items():
            self.sums[name] += loss.detach()
        return sum((self.coefs[name] * loss for name, loss in losses.items()), start=0.0)

    def _count(self, seen: Sequence[Routing], kept: Tensor) -> None:
        """On the device, without waiting for it."""
        if not self.counts:
            self.layers = [routing.layer for routing in seen]
            self.counts = [torch.zeros(r.logits.shape[1], dtype=torch.long, device=r.logits.device) for r in seen]
        for counts, routing in zip(self.counts, seen, strict=True):
            counts.scatter_add_(0, routing.experts.flatten(), kept.long().repeat_interleave(routing.experts.shape[1]))
        self.tokens = self.tokens + kept.sum()
        self.passes += 1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with self.model.disable_adapter() if self.probe else nullcontext():
            self.base = [[logits.cpu() for logits in layers] for layers in self._probe_logits()]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._report(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The steps after the last logging step: Trainer logs no loss of theirs."""
        self._report(state.global_step)

    def _report(self, step: int) -> None:
        if not self.settings.watch or not self.passes:
            return
        row = self._row(step)
        self._begin_window()
        self.job.log_metrics(row)
        self._apply_rules(row)

    def _row(self, step: int) -> dict[str, Any]:
        counts, tokens = torch.stack(self.counts).double().cpu(), int(self.tokens)
        share = counts / counts.sum(1, keepdim=True).clamp(min=1)
        return {
            "kind": "router",
            "step": step,
            "tokens": tokens,
            "layers": self.layers,
            "load_entropy": _rounded(relative_entropy(share.numpy())),
            "busiest": _rounded(counts.amax(1) / max(1, tokens)),
            "dead": (counts == 0).sum(1).tolist(),
            "kl": self._drift(),
            **{_loss_key(name): round(float(total) / self.passes, 6) for name, total in self.sums.items()},
        }

    def _drift(self) -> list[float]:
        """Mean over the probe set's tokens of KL(base || now), by layer."""
        sums, tokens = torch.zeros(len(self.layers), dtype=torch.float64), 0
        for base, now in zip(self.base, self._probe_logits(), strict=True):
            tokens += len(now[0])
            for number, logits in enumerate(now):
                sums[number] += routing_kl(base[number].to(logits.device), logits, self.layout.scoring).sum().cpu()
        return _rounded(sums / tokens)

    def _probe_logits(self) -> list[list[Tensor]]:
        """(T, E) router logits of the tokens of each batch, layer by layer, in evaluation mode."""
        decoder, _ = decoder_and_head(self.model)
        training, found = self.model.training, []
        self.model.eval()
        with torch.no_grad():
            for ids, mask in self.probe:
                with watch_routing(self.model, self.layout) as seen:
                    decoder(input_ids=ids, attention_mask=mask, use_cache=False)
                found.append([routing.logits[mask.flatten().bool()] for routing in seen])
        self.model.train(training)
        return found

    def _apply_rules(self, row: dict[str, Any]) -> None:
        """Raises TrainingError for what is past a stop limit; else warns, once of a layer until its value is back."""
        if past := self._past("stop", row):
            said = "; ".join(self._said("stop", name, layers, row) for name, layers in past.items())
            raise TrainingError(
                f"at step {row['step']}, {said}. Training stopped and no adapter was written. A "
                "lower learning rate, router.distill_coef above 0 or router.mode frozen keep the routing nearer to the "
                "base's"
            )
        past = self._past("warn", row)
        for name, layers in past.items():
            if new := [layer for layer in layers if (name, layer) not in self.warned]:
                message = f"at step {row['step']}, {self._said('warn', name, new, row)}"
                self.job.log_metrics({"kind": "warning", "step": row["step"], "message": message})
        self.warned = {(name, layer) for name, layers in past.items() for layer in layers}

    def _past(self, kind: str, row: dict[str, Any]) -> dict[str, list[int]]:
        """The rule's name → positions of the layers that are past its limit, the worst first; NaN is past any limit."""
        found = {}
        for name, (key, sign, _) in RULES.items():
            if (limit := getattr(self.settings, f"{kind}_{name}")) is not None:
                badness = [sign * value if math.isfinite(value) else math.inf for value in row[key]]
                order = sorted(range(len(badness)), key=badness.__getitem__, reverse=True)
                found[name] = [layer for layer in order if badness[layer] > sign * limit]
        return {name: layers for name, layers in found.items() if layers}

    def _said(self, kind: str, name: str, layers: list[int], row: dict[str, Any]) -> str:
        """The worst of `layers`, which are positions, with its value and the limit; then the numbers of the others."""
        key, _, text = RULES[name]
        worst, *others = (row["layers"][layer] for layer in layers)
        limit = f"router.{kind}_{name} ({getattr(self.settings, f'{kind}_{name}'):g})"
        said = f"layer {worst}: {text.format(row[key][layers[0]])} {limit}"
        if not others:
            return said
        are = f"are layers {', '.join(map(str, others))}" if others[1:] else f"is layer {others[0]}"
        return f"{said}, and so {are}"


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 6) for value in values]


def _loss_key(name: str) -> str:
    return f"{name.removesuffix('_loss')}_loss"


class WatchesRouter:
    """Mixed into a TRL trainer: TRL's loss and the recipe's losses on the routing."""

    watch: RouterWatch | None = None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        real = inputs.pop("real_tokens", None)
        if self.watch is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        with self.watch.routing() as passes:  # left before the backward pass, which may run the layers again
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)  # type: ignore[misc]
        # what is divided by the accumulation steps already is not divided by Trainer: as TRL does for its own loss
        scaled = self.loss_is_scaled_for_ga  # type: ignore[attr-defined]
        if scaled is None:
            scaled = num_items_in_batch is not None
        parts = self.current_gradient_accumulation_steps if scaled else 1  # type: ignore[attr-defined]
        return loss + self.watch.take(passes, real) / parts
