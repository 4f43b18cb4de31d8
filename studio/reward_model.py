"""A reward model of any family: the adapted decoder, and one linear head that reads the last token of a conversation.

transformers has no sequence-classification class for some families, Llama 4 among them, and the engine's experts are
in none of them; so the head is ours, for every family alike, and stands beside the adapter in a file of its own:

    adapter/reward_head.safetensors    "weight" (1, hidden) float32; metadata {"format": "pt", "reads": "last token"}

score(conversation) = weight · hidden state of its last token, after the decoder's final norm, in float32.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from adapters.errors import AdapterFileError
from studio.evaluation import decoder_and_head
from studio.methods import REWARD_HEAD

READS = "last token"
START_STD = 0.02


def add_reward_head(model: Any, seed: int = 0) -> None:
    """Gives `model` a head with small random weights, trainable; it becomes its submodule `reward_head`."""
    hidden = int(model.config.get_text_config().hidden_size)
    head = nn.Linear(hidden, 1, bias=False, dtype=torch.float32, device=model.device)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(1, hidden, generator=generator) * START_STD)
    model.reward_head = head


class RewardModel(nn.Module):
    """A model with a head, as a trainer and `evaluate_preferences` read it.

    Args:
        model: a PeftModel or plain causal LM, after `add_reward_head` or `load_reward_head`.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.config = copy.deepcopy(model.config)
        self.config.num_labels = 1

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SequenceClassifierOutput:
        """Scores of N conversations, padded on the right: `logits` (N, 1) float32."""
        decoder, _head = decoder_and_head(self.model)
        hidden = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = attention_mask.long().cumsum(1).argmax(1)
        read = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return SequenceClassifierOutput(logits=self.model.reward_head(read.float()))

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        self.model.enable_input_require_grads()
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.model.get_input_embeddings()
        return embeddings

    def add_model_tags(self, tags: list[str]) -> None:
        """TRL marks what it trained; an adapter directory has no place for it."""


def save_reward_head(model: Any, directory: Path) -> None:
    """Writes the head beside the adapter in `directory`.

    Raises:
        AdapterFileError: a weight is NaN or infinite.
    """
    weight = model.reward_head.weight.detach().float().cpu().contiguous()
    if not torch.isfinite(weight).all():
        raise AdapterFileError("the reward head holds NaN or infinity and was not written")
    save_file({"weight": weight}, directory / REWARD_HEAD, metadata={"format": "pt", "reads": READS})


def load_reward_head(model: Any, directory: Path) -> None:
    """Gives `model` the head that lies in the adapter directory.

    Raises:
        AdapterFileError: there is none, or it is of another model.
    """
    path = directory / REWARD_HEAD
    if not path.is_file():
        raise AdapterFileError(
            f"{directory} holds no {REWARD_HEAD}: it is no reward model; train one with method: reward"
        )
    with safe_open(path, "pt") as file:
        names, reads = list(file.keys()), (file.metadata() or {}).get("reads")
        weight = file.get_tensor("weight") if names == ["weight"] else torch.empty(0)
    if names != ["weight"] or reads != READS:
        expected = f"expected one weight that reads {READS!r}"
        raise AdapterFileError(f"{path}: received {names} that reads {reads!r}; {expected}")
    set_reward_head(model, weight, path)


def set_reward_head(model: Any, weight: Tensor, path: Path) -> None:
    """Gives `model` the head with this `weight` (1, hidden), which was read at `path`.

    Raises:
        AdapterFileError: it is of another model.
    """
    wanted = (1, int(model.config.get_text_config().hidden_size))
    if tuple(weight.shape) != wanted:
        raise AdapterFileError(f"{path}: received a head of shape {tuple(weight.shape)}; this model needs {wanted}")
    add_reward_head(model)
    with torch.no_grad():
        model.reward_head.weight.copy_(weight)
