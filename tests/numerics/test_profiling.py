"""A recipe's router profile: what is drawn, what is counted, and when a profile that was made is found again."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import studio
from adapters.errors import ProfileError, TargetError
from adapters.fingerprint import fingerprint
from adapters.router_profile import load_profile
from adapters.routing import watch_routing
from studio.base import EMBEDDED_DIR
from studio.base_model import load_recipe_base
from studio.data import read_examples
from studio.encoding import encode
from studio.profile import profile_path
from studio.profiling import draw_sample, profile_routing
from studio.recipe import Recipe, parse_recipe

TICKETS = Path(__file__).parents[2] / "recipes" / "data" / "tickets-eval.jsonl"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """60 tickets from two sources, every third from the second."""
    rows = [json.loads(line) for line in TICKETS.read_text().splitlines()[:60]]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row | {"source": "ab"[i % 3 == 0]}) + "\n" for i, row in enumerate(rows)))
    return path


def recipe_of(data: Path, base: Path | str = "embedded", tokens: int = 1500, extra: str = "") -> Recipe:
    return parse_recipe(
        f"model: {{base: '{base}'}}\ndata: {{train: '{data}'{extra}}}\noutput: {{dir: '{data.parent / 'job'}'}}\n"
        f"placement: {{profile_tokens: {tokens}}}\n"
    )


def test_a_profile_equals_a_count_row_by_row(data: Path) -> None:
    recipe = recipe_of(data)
    seen_progress: list[tuple[int, int]] = []
    profile = studio.make_profile(recipe, lambda done, total: seen_progress.append((done, total)))
    assert int(profile.tokens.sum()) == 1500
    assert seen_progress[-1] == (1500, 1500)
    assert profile.sources == ("a", "b")
    assert profile.shared_experts == 1

    model, tokenizer = load_recipe_base(recipe)
    sample = draw_sample(tokenizer, read_examples(data), recipe.data.max_length_tokens, 1500)
    counts: Counter[tuple[int, int, int]] = Counter()
    with torch.no_grad(), watch_routing(model, studio_layout(model)) as seen:
        for row, source in zip(sample.rows, sample.numbers, strict=True):
            seen.clear()
            model(input_ids=torch.tensor([row]))
            for layer, routing in enumerate(seen):
                counts.update((source, layer, int(e)) for e in routing.experts.flatten())
    expected = np.zeros_like(profile.routed)
    for place, count in counts.items():
        expected[place] = count
    # a token whose two best experts are within rounding may fall either way in another batch
    assert np.abs(profile.routed - expected).sum() <= 4
    assert profile.routed.sum(2).tolist() == [[int(tokens)] * len(profile.layers) for tokens in profile.tokens]


def studio_layout(model: object) -> object:
    from adapters.layouts import layout_for

    return layout_for(model.config.model_type)  # type: ignore[attr-defined]


def test_adapters_leave_their_mark_and_the_mode_comes_back(data: Path) -> None:
    model, tokenizer = load_recipe_base(recipe_of(data))
    sample = draw_sample(tokenizer, read_examples(data), 256, 400)
    before = profile_routing(model.train(), sample, tokenizer.pad_token_id)
    assert model.training
    with torch.no_grad():
        model.model.layers[1].feed_forward.router.weight[3] = 0
        model.model.layers[1].feed_forward.router.weight[5] *= 4
    after = profile_routing(model, sample, tokenizer.pad_token_id)
    assert torch.equal(before.counts.routed[:, 0], after.counts.routed[:, 0])
    assert not torch.equal(before.counts.routed[:, 1], after.counts.routed[:, 1])


def test_the_sample_is_cut_where_it_has_enough_and_takes_all_of_little(data: Path) -> None:
    _, tokenizer = load_recipe_base(recipe_of(data))
    examples = read_examples(data)
    cut, whole = (draw_sample(tokenizer, examples, 32, wanted) for wanted in (333, 10**6))
    assert cut.tokens == 333
    assert len(whole.rows) == len(examples)
    assert max(map(len, whole.rows)) <= 32
    assert cut.rows[:-1] == whole.rows[: len(cut.rows) - 1]
    assert sorted(whole.rows) == sorted(tuple(encode(tokenizer, e, 32)[0]) for e in examples)


def test_it_is_found_while_base_and_data_are_the_same(data: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(EMBEDDED_DIR, base)
    recipe = recipe_of(data, base)
    assert studio.find_profile(recipe) is None
    made = studio.make_profile(recipe)
    found = studio.find_profile(recipe)
    assert found is not None
    assert (found.base, found.data) == (made.base, made.data)
    assert load_profile(profile_path(recipe)).wanted_tokens == 1500

    others = (recipe_of(data, base, tokens=1400), recipe_of(data, base, extra=", max_length_tokens: 64"))
    assert all(studio.find_profile(other) is None for other in others)
    data.write_text(data.read_text() + data.read_text().splitlines()[0] + "\n")
    assert studio.find_profile(recipe) is None


def retrain(base: Path) -> None:
    file = next(base.glob("*.safetensors"))
    tensors = load_file(file)
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, file, {"format": "pt"})


def another_template(base: Path) -> None:
    (base / "chat_template.jinja").write_text("{{ messages }}")


def another_config(base: Path) -> None:
    path = base / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06') + " ")


@pytest.mark.parametrize("change", [retrain, another_template, another_config])
def test_the_fingerprint_changes_with_the_base(tmp_path: Path, change: Callable[[Path], None]) -> None:
    base = tmp_path / "base"
    shutil.copytree(EMBEDDED_DIR, base)
    before = fingerprint(base)
    assert fingerprint(EMBEDDED_DIR) == before
    change(base)
    assert fingerprint(base) != before


def test_a_dense_base_has_no_routing_to_profile(data: Path, tmp_path: Path) -> None:
    from tests.numerics.conftest import Tiny

    base = tmp_path / "dense"
    Tiny("llama", 64, 96).build().save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(EMBEDDED_DIR / name, base / name)
    with pytest.raises(TargetError, match="no routed experts"):
        studio.make_profile(recipe_of(data, base))


def test_delta_norms_equal_those_of_the_products() -> None:
    from adapters.deltas import expert_delta_norms
    from adapters.lora import attach
    from adapters.peft_files import expert_factors
    from adapters.placement import Placement
    from adapters.routed import use_routed_experts
    from tests.numerics.conftest import Tiny, randomise

    model = attach(
        use_routed_experts(Tiny("qwen3_moe", 64, 32).build()),
        Placement(routed=((4, 0, 2, 4, 1, 0), (0, 3, 3, 0, 0, 4)), alpha=12.0),
    )
    randomise(model)
    norms = expert_delta_norms(model)
    layers = [module for _, module in model.named_modules() if type(module).__name__ == "ExpertLora"]
    assert norms["layers"] == [1, 3]
    for projection in ("gate_up_proj", "down_proj"):
        for found, layer in zip(norms[projection], layers, strict=True):
            factors = expert_factors(layer, projection)
            expected = [float(factors.delta(expert).norm()) for expert in range(6)]
            assert found == pytest.approx(expected, rel=1e-5)
    assert norms["down_proj"][0][1] == 0.0


def test_many_sources_become_the_most_frequent_and_the_rest() -> None:
    from studio.profiling import MOST_SOURCES, OTHER_SOURCES, _numbered

    named = [f"s{i:03}" for i in range(50) for _ in range(100 - i)]
    numbers, sources = _numbered(named)
    assert len(sources) == MOST_SOURCES
    assert sources[:-1] == tuple(f"s{i:03}" for i in range(MOST_SOURCES - 1))
    for name, number in zip(named, numbers, strict=True):
        assert sources[number] == (name if name in sources else OTHER_SOURCES)
    few = _numbered(["b", "a", "b"])
    assert few == ((1, 0, 1), ("a", "b"))


def test_one_expert_of_a_stack_changes_the_fingerprint(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(EMBEDDED_DIR, base)
    before, file = fingerprint(base), next(base.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("gate_up_proj"))
    tensors[name][3] += 0.01
    save_file(tensors, file, {"format": "pt"})
    assert fingerprint(base) != before


def test_data_that_change_meanwhile_leave_no_profile(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(data)

    def changed(done: int, total: int) -> None:
        data.write_text(data.read_text() + data.read_text().splitlines()[0] + "\n")

    with pytest.raises(ProfileError, match="changed while they were being profiled"):
        studio.make_profile(recipe, changed)
    assert studio.find_profile(recipe) is None


def test_a_renamed_file_is_another_source(data: Path) -> None:
    recipe = recipe_of(data)
    renamed = data.rename(data.with_name("other.jsonl"))
    assert profile_path(recipe_of(renamed)) != profile_path(recipe_of(renamed.rename(data)))
    assert profile_path(recipe) == profile_path(recipe_of(data))


def test_a_torn_profile_is_made_again(data: Path) -> None:
    recipe = recipe_of(data, tokens=300)
    studio.make_profile(recipe)
    profile_path(recipe).write_bytes(b"torn")
    assert studio.find_profile(recipe) is None
    studio.make_profile(recipe)
    assert studio.find_profile(recipe) is not None


def test_profiles_saved_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from tests.unit.test_placement import profile_of

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(profile_of().save, tmp_path / "p.safetensors") for _ in range(64)]:
            done.result()
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]
    assert load_profile(tmp_path / "p.safetensors").tokens.tolist() == [1120, 1120]


def test_pairs_are_those_chosen_together_most_often() -> None:
    import dataclasses

    from tests.unit.test_placement import profile_of

    profile = dataclasses.replace(profile_of((0, 1), 4), top_k=2)
    profile.together[1, 2, 3] = profile.together[1, 3, 2] = 560  # type: ignore[index]
    profile.together[1, 0, 3] = profile.together[1, 3, 0] = 224  # type: ignore[index]
    assert profile.pairs(2)[1] == [(2, 3, 0.25), (0, 3, 0.1)]
    assert profile_of().pairs() == []  # top-1
