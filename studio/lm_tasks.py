"""Tasks of lm-eval (EleutherAI's harness, 0.4.13) on the studio's own model: routed, 4 bit, adapters as they are set.

    Tasks(["tasks/domains.yaml"])   reads tasks and data          run(model, tokenizer, …) ─▶ {"TASK/METRIC": Measure}

A task is a name of lm-eval's own, whose data set must be in the local cache, or a YAML file. Paths of a file's data
start at the file. A task file is code as much as data: its templates and functions are run. Nothing is downloaded and
nothing is sent.

A metric keeps lm-eval's standard error; its interval is 1.96 of these, and Wilson's where the metric is the share of
examples that are right: lm-eval's error is 0 where none or all are.

The harness's model class computes logits of all positions; `RoutedLM` those of the continuations alone, 256 at a time.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studio.errors import DataError, Problem, StudioError
from studio.evaluation import LOGITS_CHUNK_TOKENS, decoder_and_head
from studio.metrics import Kind, Measure, Scores, from_error, measured

Progress = Callable[[int, int], None]
SEED = 1234
"""lm-eval's own, of the few-shot examples."""

BOOTSTRAPS = 1000
"""Resamples for the error of a metric that is no mean, as BLEU; lm-eval's default is 100,000."""

HIDDEN = ("sample_len", "sample_count", "name", "alias")


class Tasks:
    """Tasks with their data, ready to run.

    Args:
        wanted: names, and paths of YAML files.

    Raises:
        StudioError: no such task, a file that is none, or data that are not here.
    """

    def __init__(self, wanted: Sequence[str]):
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        files = [name for name in wanted if name.endswith((".yaml", ".yml"))]
        manager = TaskManager(include_defaults=len(files) < len(wanted))
        self.found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in wanted:
            loaded = _loaded(manager, name)
            for part, entries in self.found.items():
                entries.update(loaded.get(part) or {})

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        max_length_tokens: int | None = None,
        examples: int | None = None,
        chat_template: bool = False,
        progress: Progress | None = None,
    ) -> dict[str, Measure]:
        """Every metric of every task and group, as "TASK/METRIC", with lm-eval's standard error.

        Args:
            max_length_tokens: longest input; the model's own where None. What is longer loses its beginning.
            examples: the first so many of each task.
        """
        was_training = model.training
        lm = RoutedLM(model, tokenizer, batch_size, max_length_tokens, progress)
        _seed(self.found["tasks"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            answer = evaluate(
                lm=cast(LM, lm),
                task_dict=cast(Any, self.found),
                limit=examples,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=True,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
            )
        model.train(was_training)
        return _measures(cast(dict[str, Any], answer))


class RoutedLM(HFLM):
    """A loaded model for the harness.

    Args:
        progress: called with (requests done, requests in all) of each kind of request in turn.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_length_tokens: int | None = None,
        progress: Progress | None = None,
    ):
        # HFLM would tie the weights anew, which a quantised or adapted model must not have done to it
        cast(Any, model).tie_weights = lambda *_, **__: None
        try:
            super().__init__(
                pretrained=model,
                tokenizer=cast(Any, tokenizer),
                backend="causal",
                batch_size=batch_size,
                max_length=max_length_tokens,
            )
        finally:
            del model.tie_weights
        self._progress, self._done, self._total = progress, 0, 0

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: Any = None
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities of the continuation in nats, whether greedy decoding gives it) of each request.

        Args:
            requests: (key, ids of the context, ids of the continuation), the last two not empty.
        """
        rows = [(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        self._start(len(rows))
        size = override_bs or int(self.batch_size)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            for i, answer in zip(chosen, self._batch([rows[i] for i in chosen]), strict=True):
                found[i] = answer
            self._advance(len(chosen))
        return found

    @torch.inference_mode()
    def _batch(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        kept = [((context + target)[-self.max_length - 1 :], target[-self.max_length :]) for context, target in rows]
        longest = max(len(ids) for ids, _ in kept) - 1
        pad = int(self.tokenizer.pad_token_id or 0)
        inputs = torch.tensor([ids[:-1] + [pad] * (longest - len(ids) + 1) for ids, _ in kept], device=self.device)
        lengths = torch.tensor([len(ids) - 1 for ids, _ in kept], device=self.device)
        mask = (torch.arange(longest, device=self.device) < lengths[:, None]).long()
        decoder, head = decoder_and_head(self.model)
        hidden = decoder(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        answers = []
        for row, (ids, target) in enumerate(kept):
            end = len(ids) - 1
            answers.append(
                _scored(head, hidden[row, end - len(target) : end], torch.tensor(target, device=self.device))
            )
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self._start(len(requests))
        return super().generate_until(requests, disable_tqdm=True)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        with torch.inference_mode():
            output = super()._model_generate(context, max_length, stop, **options)
        self._advance(len(context))
        return output

    def _start(self, total: int) -> None:
        self._done, self._total = 0, total

    def _advance(self, count: int) -> None:
        self._done = min(self._total, self._done + count)
        if self._progress:
            self._progress(self._done, self._total)


def _scored(head: Any, hidden_PH: Tensor, target_P: Tensor) -> tuple[float, bool]:
    total, greedy = 0.0, True
    for hidden, target in zip(hidden_PH.split(LOGITS_CHUNK_TOKENS), target_P.split(LOGITS_CHUNK_TOKENS), strict=True):
        logits = head(hidden).float()
        total -= float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        greedy = greedy and bool((logits.argmax(-1) == target).all())
    return total, greedy


# -------------------------------------------------------------------- tasks


def _loaded(manager: TaskManager, name: str) -> dict[str, Any]:
    try:
        spec = _from_file(Path(name)) if name.endswith((".yaml", ".yml")) else name
        return cast(dict[str, Any], manager.load([spec]))
    except StudioError:
        raise
    except KeyError:
        raise StudioError(
            f"evaluation.tasks: {name!r} is no task of lm-eval; `lm-eval ls tasks` lists them. A file of your own ends "
            "in .yaml"
        ) from None
    except Exception as error:  # of datasets, jinja, yaml, or the functions of the task
        raise StudioError(
            f"evaluation.tasks: {name} cannot be loaded: {type(error).__name__}: {error}. Data are not downloaded: "
            "fetch one with hf download --repo-type dataset NAME, or name local files in the task (dataset_path: json, "
            "dataset_kwargs: {data_files: …})"
        ) from None


def _from_file(path: Path) -> dict[str, Any]:
    """The configuration in a task file, its data files as absolute paths."""
    if not path.is_file():
        raise DataError([Problem("", None, "cannot be read: no such file", str(path))])
    config = cast(dict[str, Any], load_yaml(path, resolve_func=True))
    if not isinstance(config, dict) or not ({"task", "group"} & config.keys()):
        raise DataError([Problem("task", None, "is missing: a task file names its task or group", str(path))])
    options = config.get("dataset_kwargs") or {}
    for name in ("data_files", "data_dir"):
        if name in options:
            options[name] = _beside(path.parent, options[name])
    return config


def _beside(folder: Path, value: Any) -> Any:
    if isinstance(value, str):
        return str(folder / value) if "://" not in value else value
    if isinstance(value, dict):
        return {name: _beside(folder, item) for name, item in value.items()}
    return [_beside(folder, item) for item in value] if isinstance(value, list) else value


def _seed(tasks: dict[str, Any]) -> None:
    random.seed(SEED)
    np.random.seed(SEED)
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)


def _measures(answer: dict[str, Any]) -> dict[str, Measure]:
    found: dict[str, Measure] = {}
    for task, values in answer["results"].items():
        count = int(answer.get("n-samples", {}).get(task, {}).get("effective") or values.get("sample_len") or 0)
        for key, value in values.items():
            metric, comma, chain = str(key).partition(",")
            if not comma or metric.endswith("_stderr") or metric in HIDDEN or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{chain}")
            error = float(error) if isinstance(error, int | float) else None
            rises = (answer.get("higher_is_better", {}).get(task) or {}).get(metric)
            name = f"{task}/{metric}" if chain == "none" else f"{task}/{metric},{chain}"
            scores = _by_example(answer.get("samples", {}).get(task) or [], metric, chain, float(value), rises)
            found[name] = Measure(
                measured(scores) if scores and scores.kind == "share" else from_error(float(value), error, count),
                "lower" if rises is False else "higher",
                scores,
                error,
            )
    return found


def _by_example(
    samples: Sequence[dict[str, Any]], metric: str, chain: str, value: float, rises: bool | None
) -> Scores | None:
    """The values by example, where their mean is the metric."""
    rows = sorted((row for row in samples if row.get("filter") == chain), key=lambda row: row["doc_id"])
    values = [row.get(metric) for row in rows]
    if not values or not all(isinstance(each, int | float | bool) for each in values):
        return None
    numbers = tuple(float(cast(float, each)) for each in values)
    if abs(sum(numbers) / len(numbers) - value) > 1e-9:
        return None
    kind: Kind = "share" if set(numbers) <= {0.0, 1.0} else "mean"
    return Scores(kind, "lower" if rises is False else "higher", numbers)
