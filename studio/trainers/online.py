"""What GRPO and RLOO do alike here: sample from the engine, reward, and learn, with one copy of the model.

    train_online(_Trainer, GRPOConfig, model, tokenizer, recipe, rows, job)

Where this differs from TRL's own trainers on a PeftModel:
    - The reference (beta > 0) is the base with the adapters off. TRL copies the adapter under the name "ref"; a fresh
      adapter changes nothing, so that copy would be the base, too, and expert LoRA takes no second adapter. An adapter
      that is trained further (`adapter.start_from`) is the reference as it began: studio/trainers/reference.py.
    - Completions, and the log-probabilities that need no gradient, are computed in evaluation mode: no dropout, no
      routers that sample, and the cache of keys and values is used under gradient checkpointing as well.
    - Advantages are computed in float64, and a group whose rewards are alike within rounding has none: what float32
      leaves of a mean of 0.2 would be a gradient, which AdamW scales up to whole steps.
    - Prompts become tokens by the studio's own encoding, the same as in evaluation, tools included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import add_fused_lm_head

from studio.data import Example
from studio.encoding import prompt_ids
from studio.errors import TrainingError
from studio.job_files import append_line, to_json
from studio.jobs import Job
from studio.recipe import Recipe
from studio.rewards import Attempt, Reward, Scored, rewards_of
from studio.rewards.samples import SAMPLES, as_sample
from studio.sampling import AS_IT_IS
from studio.trainers.chunked_loss import use_small_tiles
from studio.trainers.common import StudioTrainer, callbacks, finish, options
from studio.trainers.llama4 import repair_for_trl
from studio.trainers.reference import as_reference, evaluation_mode
from studio.trainers.router import watch_router

LOGGED = (
    "reward", "reward_std", "frac_reward_zero_std", "kl", "clip_ratio/region_mean",
    "completions/mean_length", "completions/max_length", "completions/clipped_ratio",
)  # fmt: skip

ALIKE = 1e-6
"""Rewards of a group that differ by less than this share of their size are the same reward, rounded."""

MOSTLY_ALIKE = 0.9
"""Share of groups that were rewarded alike, above which the job says so at its end."""

NO_SIGNAL = 1e-9
"""Advantages below this are what float64 leaves of equal rewards: 1e-16 of them, by TRL's 1e-4 where it normalises."""


def alike_made_equal(rewards_RF: Tensor, weights_F: Tensor, group: int) -> tuple[Tensor, float]:
    """R rewards of F functions in float64, with equal weighted sums in groups whose sums are alike within rounding.

    What a sum lacks to that of the first of its group goes to the first function. With it, the share of such groups.
    """
    parts = (rewards_RF * weights_F.double()).view(-1, group, len(weights_F))
    sums, size = parts.sum(-1), parts.abs().sum(-1).amax(1, keepdim=True)
    lacking = sums[:, :1] - sums
    alike = lacking.abs().amax(1, keepdim=True) <= ALIKE * size
    equal = rewards_RF.clone()
    equal[:, 0] += (lacking.where(alike, 0) / weights_F[0].double()).flatten()
    return equal, float(alike.double().mean())


def taught_nothing(alike: Sequence[float]) -> list[str]:
    """The warning of a training in which nearly all groups were rewarded alike, from their share in each generation."""
    share = sum(alike) / max(1, len(alike))
    if share <= MOSTLY_ALIKE:
        return []
    learned = "nothing was learned" if share == 1 else "next to nothing was learned"
    return [
        f"in {100 * share:.3g} % of the groups all answers were rewarded alike, so {learned}; raise "
        "sampling.temperature, change the rewards, or let adapter.start_from name an adapter that sometimes gets one"
    ]


@contextmanager
def no_copy_of_the_adapter(model: PeftModel) -> Iterator[None]:
    """Inside, the constructors of TRL's trainers copy the adapter onto nothing, and take the adapters off instead."""

    def nowhere(name: str) -> Tensor:
        found = PeftModel.get_parameter(model, name.replace(".ref.", ".default."))
        return torch.empty_like(found, device="meta") if ".ref." in name else found

    with patch.object(model, "add_adapter", lambda *_: None), patch.object(model, "get_parameter", nowhere):
        yield


class OnlineTrainer(StudioTrainer):
    """Mixed into GRPOTrainer or RLOOTrainer."""

    examples: Sequence[Example]
    rewards: Sequence[Reward]
    job: Job
    first: list[dict[str, Any]]
    """The completions of the first prompt of the first generation, and of the last one so far."""
    last: list[dict[str, Any]]
    alike: list[float]
    """Of each generation, the share of groups whose rewards are alike."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._asked = [self.examples[int(row["row"])] for row in inputs]
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        advantages: Tensor = output["advantages"]
        output["advantages"] = advantages.where(advantages.abs() > NO_SIGNAL, 0).float()
        logged = self._metrics["train" if self.model.training else "eval"]  # type: ignore[attr-defined]
        logged["frac_reward_zero_std"][-1] = self.alike[-1]  # TRL's counts RLOO's penalty and a batch's spread as well
        return output

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [prompt_ids(self.processing_class, example) for example in self._asked], None, {}  # type: ignore[attr-defined]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model  # type: ignore[attr-defined]
        if not all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad):
            raise TrainingError(
                f"the adapter holds NaN or infinity after step {self.state.global_step}: training stopped and no "  # type: ignore[attr-defined]
                f"adapter was written. A learning rate lower than {self.args.learning_rate:g} usually helps"  # type: ignore[attr-defined]
            )
        with evaluation_mode(model):
            return super()._generate_single_turn(*args, **kwargs)  # type: ignore[misc]

    def _get_per_token_logps_and_entropies(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or model is self.ref_model:  # type: ignore[attr-defined]
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)  # type: ignore[misc]
        with evaluation_mode(model):
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)  # type: ignore[misc]

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: list[str], *args: Any) -> Tensor:
        values: Tensor = super()._calculate_rewards(inputs, prompts, completions, *args)  # type: ignore[misc]
        group = [self._sample(place, completions[place], values[place].tolist()) for place in range(self._group)]
        self.first = self.first or group
        self.last = group
        for sample in group:
            append_line(self.job.path / SAMPLES, to_json(sample))
        weights = self.reward_weights.to(values.device)  # type: ignore[attr-defined]
        equal, alike = alike_made_equal(values.double(), weights, self._group)
        self.alike.append(alike)
        return equal

    @property
    def _group(self) -> int:
        return int(self.num_generations)  # type: ignore[attr-defined]

    def _sample(self, place: int, completion: str, values: list[float]) -> dict[str, Any]:
        each = {reward.name: value for reward, value in zip(self.rewards, values, strict=True)}
        total = sum(reward.weight * each[reward.name] for reward in self.rewards)
        scored = Scored(Attempt(completion, self._asked[place]), each, total)
        return {"step": self.state.global_step, **as_sample(scored)}  # type: ignore[attr-defined]


def train_online(
    trainer_class: Any,
    config_class: Any,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    rows: Sequence[Example],
    job: Job,
) -> dict[str, Any]:
    """Trains the adapters of `model` in place on completions that it writes itself.

    Returns:
        as `studio.trainers.common.finish`; "samples": {"first": …, "last": …}, completions of one prompt each; and
        "warnings": what there is to say of the training, also in metrics.jsonl.

    Raises:
        as `studio.trainers.common.finish`; and
        RewardError: a reward could not be computed.
        TargetError: the recipe's section `router` asks for what this model cannot have.
    """
    watch = watch_router(model, tokenizer, recipe, rows, job)
    use_small_tiles()
    repair_for_trl(cast(PreTrainedModel, model.get_base_model()))
    rewards = rewards_of(recipe)
    args = config_class(**_options(recipe, job, rewards))
    with no_copy_of_the_adapter(model):
        trainer = trainer_class(
            model=model,
            reward_funcs=[_as_trl(reward, rows) for reward in rewards],
            args=args,
            train_dataset=Dataset.from_list(
                [{"prompt": row.prompt[-1].content, "row": i} for i, row in enumerate(rows)]
            ),
            processing_class=tokenizer,
            callbacks=callbacks(recipe, job, watch, (*LOGGED, *(f"rewards/{reward.name}/mean" for reward in rewards))),
        )
    trainer.watch, trainer.examples, trainer.rewards, trainer.job = watch, rows, rewards, job
    trainer.first, trainer.last, trainer.alike = [], [], []
    _draw_as_it_is(trainer)
    if trainer.beta and recipe.adapter.start_from:
        trainer.ref_model = as_reference(model, recipe)
        in_float32 = getattr(args, "cast_lm_head_to_fp32", False)
        add_fused_lm_head(trainer.ref_model, temperature=trainer.temperature, cast_lm_head_to_fp32=in_float32)
    outcome, said = finish(trainer), taught_nothing(trainer.alike)
    for words in said:
        job.log_metrics({"kind": "warning", "message": words})
    return {**outcome, "samples": {"first": trainer.first, "last": trainer.last}, "warnings": said}


def _draw_as_it_is(trainer: Any) -> None:
    """Completions are learned from as if the model had drawn them; what the recipe asks for under `trl` stays."""
    unset = {name: value for name, value in AS_IT_IS.items() if trainer.generation_kwargs.get(name) is None}
    trainer.generation_kwargs.update(unset)
    trainer.generation_config.update(**unset)


def _options(recipe: Recipe, job: Job, rewards: Sequence[Reward]) -> dict[str, Any]:
    sampling = recipe.sampling
    return options(
        recipe,
        job,
        num_generations=sampling.completions,
        max_completion_length=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        reward_weights=[reward.weight for reward in rewards],
        router_aux_loss_coef=0.0,  # the studio's own losses on the routing are in studio/trainers/router.py
    )


def _as_trl(reward: Reward, rows: Sequence[Example]) -> Any:
    def scores(completions: list[str], row: list[int], **_: Any) -> list[float]:
        return reward([Attempt(text, rows[int(i)]) for text, i in zip(completions, row, strict=True)])

    scores.__name__ = reward.name
    return scores
