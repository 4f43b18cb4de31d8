"""The reference of a preference method: the base model, which is the policy with its adapters off. No second copy.

TRL 1.16 copies the adapter of a `PeftModel` that it is handed and takes the copy for the reference. Handed a
`BaseAsReference`, it asks that one instead, in training as well as for precomputed log-probabilities.
"""

from __future__ import annotations

from typing import Any, cast
from uuid import uuid4

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from studio.evaluation import decoder_and_head


class BaseAsReference(nn.Module):
    """A module without parameters of its own, with what TRL's fused output head asks of a model.

    Args:
        policy: whose adapters are off while the reference computes, and as they were afterwards.
    """

    def __init__(self, policy: PeftModel):
        super().__init__()
        self.config = policy.config
        # TRL names its file of precomputed log-probabilities by a hash of the state: another one for each reference
        self.register_buffer("number", torch.tensor(list(uuid4().bytes)))
        self._policy = (policy,)  # in a tuple, so that its parameters do not become this module's

    def base_model(self, *args: Any, **inputs: Any) -> Any:
        """The decoder's output, from the base's weights alone."""
        decoder, _ = decoder_and_head(self._policy[0])
        with self._policy[0].disable_adapter():
            return decoder(*args, **inputs)

    def get_output_embeddings(self) -> nn.Module:
        return cast(nn.Module, decoder_and_head(self._policy[0])[1])

    def forward(self, *args: Any, **inputs: Any) -> Any:
        with self._policy[0].disable_adapter():
            return self._policy[0](*args, **inputs)


def as_reference(policy: PeftModel) -> PreTrainedModel:
    """The reference, by the type that TRL's signatures ask for."""
    return cast(PreTrainedModel, BaseAsReference(policy))
