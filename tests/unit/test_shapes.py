"""Published shapes: name for name what the stock class has, and the parameter counts that are known of them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from studio.shapes import SHAPES, Shape, published_shape


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_published_shape_has_the_tensors_of_the_stock_class(shape: Shape) -> None:
    config = AutoConfig.for_model(**shape.config)
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    expected = {name: tuple(tensor.shape) for name, tensor in stock.state_dict().items()}
    index = shape.index()
    assert {name: info.shape for name, info in index.items()} == expected
    assert {info.dtype for info in index.values()} == {"BF16"}
