"""What the section `router` may ask for of a model: losses and rules that could do nothing are refused."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.errors import TargetError
from adapters.layouts import LAYOUTS
from studio.placing import check_router
from studio.recipe_model import RouterSettings


def check(config: dict[str, Any], experts: int = 8, family: str = "qwen3_moe", **router: float) -> None:
    check_router(RouterSettings.model_validate(router), LAYOUTS[family], experts, config)


@pytest.mark.parametrize("rule", ["warn_entropy", "stop_entropy"])
def test_an_entropy_rule_is_above_what_the_same_experts_for_all_give(rule: str) -> None:
    check({"num_experts_per_tok": 2}, **{rule: 0.34})
    with pytest.raises(TargetError, match=rf"router\.{rule} is 0\.33, .* 2 of 8 experts.*allowed: above 0\.333"):
        check({"num_experts_per_tok": 2}, **{rule: 0.33})  # log 2 / log 8
    with pytest.raises(TargetError, match="never reached"):
        check({"num_experts_per_tok": 1}, **{rule: 0.0})


@pytest.mark.parametrize(("config", "experts"), [({"num_experts_per_tok": 4}, 4), ({"num_experts_per_tok": 1}, 1)])
def test_no_entropy_rule_works_where_every_expert_sees_every_token(config: dict[str, Any], experts: int) -> None:
    check(config, experts, stop_busiest=0.5)
    with pytest.raises(TargetError, match=rf"cannot work .* {experts} of {experts} experts.*always even.*leave it out"):
        check(config, experts, warn_entropy=1.0)


@pytest.mark.parametrize("config", [{}, {"num_experts_per_tok": 0}, {"num_experts_per_tok": None}])
def test_a_model_without_a_top_k_is_an_error_of_ours_and_only_of_an_entropy_rule(config: dict[str, Any]) -> None:
    check(config)
    check(config, stop_kl=0.5, warn_busiest=0.5)
    with pytest.raises(
        TargetError, match=r"router\.stop_entropy .*num_experts_per_tok is (None|0); expected the experts of a token"
    ):
        check(config, stop_entropy=0.5)


def test_the_layer_with_the_fewest_experts_of_a_token_sets_the_bound() -> None:
    layers = {"moe_topk": [8, 2, 4]}
    check(layers, 8, "hunyuan_v1_moe", warn_entropy=0.5)  # log 2 / log 8 is 1/3, log 8 / log 8 is 1
    with pytest.raises(TargetError, match="2 of 8 experts"):
        check(layers, 8, "hunyuan_v1_moe", warn_entropy=0.3)


def test_a_dense_model_has_no_routing_to_ask_for() -> None:
    check({}, 0, "llama")
    with pytest.raises(TargetError, match=r"router\.warn_entropy is set, but this llama model has no routed experts"):
        check({}, 0, "llama", warn_entropy=0.5)
