"""What TRL 1.16 needs of a Llama 4 instance. Each repair has a test that fails once TRL works without it."""

from __future__ import annotations

from transformers import PreTrainedModel


def repair_for_trl(model: PreTrainedModel) -> None:
    """Makes `model.base_model` the decoder, as TRL's loss expects.

    `Llama4ForCausalLM.base_model_prefix` names a module that only the multimodal class has, so `.base_model` returns
    the whole model. Set on the instance, after loading: on the class it would change which checkpoint keys are found.
    """
    if model.config.model_type == "llama4_text":
        model.base_model_prefix = "model"
