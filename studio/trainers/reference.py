"""The reference of a preference method: what the training begins with. No second copy of the model.

That is the base, which is the policy with its adapters off; with `adapter.start_from` it is the adapter that was given,
whose factors are then held once more and put in the place of the trained ones while the reference computes. Either way
it computes in evaluation mode: no dropout, and no routers that add noise.

TRL 1.16 copies the adapter of a `PeftModel` that it is handed and takes the copy for the reference. Handed a
`Reference`, it asks that one instead, in training as well as for precomputed log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from uuid import uuid4

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from studio.evaluation import decoder_and_head
from studio.recipe import Recipe


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode inside, as it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class Reference(nn.Module):
    """A module without parameters of its own, with what TRL's fused output head asks of a model.

    Args:
        policy: which computes the reference, and is as it was afterwards.
        start: the adapter as it is now is the reference; else none is.
    """

    def __init__(self, policy: PeftModel, start: bool):
        super().__init__()
        self.config = policy.config
        # TRL names its file of precomputed log-probabilities by a hash of the state: another one for each reference
        self.register_buffer("number", torch.tensor(list(uuid4().bytes)))
        self._policy = (policy,)  # in a tuple, so that its parameters do not become this module's
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad] if start else []
        self._start = [(parameter, parameter.detach().clone()) for parameter in trained]

    @contextmanager
    def as_it_began(self) -> Iterator[None]:
        """Inside, the policy is the reference."""
        policy = self._policy[0]
        with evaluation_mode(policy), self._put_in_place() if self._start else policy.disable_adapter():
            yield

    @contextmanager
    def _put_in_place(self) -> Iterator[None]:
        now = [parameter.data for parameter, _ in self._start]
        try:
            for parameter, began in self._start:
                parameter.data = began
            yield
        finally:
            for (parameter, _), trained in zip(self._start, now, strict=True):
                parameter.data = trained

    def base_model(self, *args: Any, **inputs: Any) -> Any:
        """The decoder's output."""
        with self.as_it_began():
            return decoder_and_head(self._policy[0])[0](*args, **inputs)

    def get_output_embeddings(self) -> nn.Module:
        return cast(nn.Module, cast(Any, self._policy[0].get_base_model()).get_output_embeddings())

    def forward(self, *args: Any, **inputs: Any) -> Any:
        with self.as_it_began():
            return self._policy[0](*args, **inputs)


def as_reference(policy: PeftModel, recipe: Recipe) -> PreTrainedModel:
    """The reference of a training that begins now, by the type that TRL's signatures ask for."""
    return cast(PreTrainedModel, Reference(policy, start=recipe.adapter.start_from is not None))
