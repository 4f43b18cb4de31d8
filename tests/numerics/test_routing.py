"""What is seen of the routers, family by family, against a slow recount; and the profile's file."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters.errors import LayoutError, ProfileError
from adapters.routed import moe_blocks, use_routed_experts
from adapters.router_profile import RouterProfile, load_profile, relative_entropy
from adapters.routing import Counts, count_routing, watch_routing
from tests.numerics.conftest import EACH, EXPERTS, MOE_LAYERS, Tiny

MOE = [tiny for tiny in EACH if tiny.layout.has_experts]


@pytest.mark.parametrize("tiny", MOE, ids=str)
def test_logits_experts_and_weights_are_the_routers_own(tiny: Tiny, ids: Tensor) -> None:
    model = use_routed_experts(tiny.build())
    layout = tiny.layout
    inputs: list[Tensor] = []
    routers = [block.get_submodule(layout.router) for _, block in moe_blocks(model, layout)]
    for router in routers:
        router.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].flatten(0, -2)))
    with watch_routing(model, layout) as seen:
        model(input_ids=ids)
    assert [routing.layer for routing in seen] == sorted({routing.layer for routing in seen})
    assert len(seen) == len(routers) == MOE_LAYERS
    for routing, router, x in zip(seen, routers, inputs, strict=True):
        expected = torch.nn.functional.linear(x.float(), router.weight, getattr(router, "bias", None))
        torch.testing.assert_close(routing.logits.float(), expected, rtol=0, atol=1e-5)
        assert routing.experts.shape == routing.weights.shape == (ids.numel(), tiny.top_k)
        assert routing.logits.requires_grad
        chosen = routing.logits.gather(1, routing.experts).min()
        assert torch.isfinite(chosen)
    with torch.no_grad():
        model(input_ids=ids)
    assert len(seen) == MOE_LAYERS  # the hooks are gone


@pytest.mark.parametrize("tiny", MOE, ids=str)
def test_counts_equal_a_recount_token_by_token(tiny: Tiny, ids: Tensor) -> None:
    model = use_routed_experts(tiny.build())
    kept = torch.rand(ids.numel(), generator=torch.Generator().manual_seed(1)) > 0.3
    sources = torch.arange(ids.numel()) % 3
    with watch_routing(model, tiny.layout) as seen, torch.no_grad():
        model(input_ids=ids)
        counts = count_routing(seen, kept, sources, 3)
    routed: Counter[tuple[int, int, int]] = Counter()
    together: Counter[tuple[int, int, int]] = Counter()
    gate: dict[tuple[int, int, int], float] = {}
    for layer, routing in enumerate(seen):
        for token in kept.nonzero().flatten().tolist():
            chosen = routing.experts[token].tolist()
            for expert, weight in zip(chosen, routing.weights[token].tolist(), strict=True):
                place = (token % 3, layer, expert)
                routed[place] += 1
                gate[place] = gate.get(place, 0.0) + weight
                for other in chosen:
                    together[layer, expert, other] += 1
    for place in np.ndindex(3, MOE_LAYERS, EXPERTS):
        assert counts.routed[place] == routed[place]
        assert float(counts.gate[place]) == pytest.approx(gate.get(place, 0.0), abs=1e-5)
    for place in np.ndindex(MOE_LAYERS, EXPERTS, EXPERTS):
        assert counts.together[place] == together[place]
    assert counts.tokens.tolist() == [int(((sources == s) & kept).sum()) for s in range(3)]


def test_a_dense_model_has_nothing_to_watch() -> None:
    tiny = Tiny("llama", 64, 96)
    with pytest.raises(LayoutError, match="no MoE layer"), watch_routing(tiny.build(), tiny.layout):
        pass


def profile_of(counts: Counts) -> RouterProfile:
    arrays = {name: tensor.numpy() for name, tensor in vars(counts).items()}
    sources = tuple(f"source {number}" for number in range(len(counts.tokens)))
    return RouterProfile("base", "data", 0, 100, (1, 3), 2, 1, sources, **arrays)


def random_counts() -> Counts:
    generator = torch.Generator().manual_seed(5)
    routed = torch.randint(0, 9, (2, 2, 5), generator=generator)
    together = torch.randint(0, 9, (2, 5, 5), generator=generator)
    return Counts(routed, torch.rand(2, 2, 5, dtype=torch.float64, generator=generator), together, torch.tensor([7, 9]))


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    profile = profile_of(random_counts() + random_counts())
    profile.save(tmp_path / "new" / "profile.safetensors")
    again = load_profile(tmp_path / "new" / "profile.safetensors")
    for name, value in vars(profile).items():
        np.testing.assert_array_equal(getattr(again, name), value, err_msg=name)
    np.testing.assert_allclose(again.share().sum(1), 1)
    np.testing.assert_allclose(again.share("source 1")[0], profile.routed[1, 0] / profile.routed[1, 0].sum())
    np.testing.assert_allclose(again.mean_gate(), profile.gate.sum(0) / 32)


def test_a_damaged_or_foreign_profile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.safetensors"
    with pytest.raises(ProfileError, match="cannot be read"):
        load_profile(path)
    profile_of(random_counts()).save(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ProfileError, match="cannot be read"):
        load_profile(path)
    from safetensors.numpy import save_file

    save_file({"routed": np.zeros(3)}, path)
    with pytest.raises(ProfileError, match="not a router profile of version 1"):
        load_profile(path)
    with pytest.raises(ProfileError, match="no data source 'c'; it has source 0, source 1"):
        profile_of(random_counts()).share("c")


def test_relative_entropy_goes_from_one_expert_to_all() -> None:
    shares = np.array([[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0]])
    np.testing.assert_allclose(relative_entropy(shares), [1, 0, 0.5])
    np.testing.assert_allclose(relative_entropy(np.ones((3, 1))), 1)


def test_an_expert_without_tokens_and_a_sample_without_tokens_have_share_0() -> None:
    counts = random_counts()
    empty = replace(counts, routed=torch.zeros_like(counts.routed), tokens=torch.zeros(2, dtype=torch.long))
    assert not profile_of(empty).share().any()
    assert np.isfinite(profile_of(empty).mean_gate()).all()
