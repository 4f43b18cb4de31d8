"""Recipes: defaults, round trip, and what a person who mistyped something is told."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from studio.errors import Problem, RecipeError
from studio.methods import METHODS
from studio.placing import needs_profile
from studio.plan import make_plan
from studio.recipe import Recipe, load_recipe, parse_recipe, recipe_schema, recipe_to_yaml
from studio.trl_options import PREFERENCE_FIELDS, REASONS, RECIPE_FIELDS, SAMPLING_FIELDS, trl_options, trl_problem
from tests.unit.test_placement import profile_of

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
NEEDED = "data: {train: train.jsonl}\noutput: {dir: runs/x}\n"


def problems_of(text: str) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text)
    return caught.value.problems


def only_problem(text: str) -> Problem:
    problems = problems_of(text)
    assert len(problems) == 1, problems
    return problems[0]


def test_two_fields_make_a_recipe_and_the_rest_has_defaults() -> None:
    recipe = parse_recipe(NEEDED)
    assert recipe.model.base == "embedded"
    assert recipe.placement.rule == "all_experts" and recipe.router.mode == "frozen"
    assert recipe.training.epochs == 3.0 and recipe.training.max_steps is None
    assert recipe.trl == {}


def test_a_recipe_is_frozen() -> None:
    recipe = parse_recipe(NEEDED)
    with pytest.raises(ValidationError):
        recipe.training.batch_size = 2  # type: ignore[misc]


def test_data_paths_start_at_the_recipe_and_the_output_at_the_working_directory(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "recipe.yaml"
    file.parent.mkdir()
    file.write_text(NEEDED.replace("train.jsonl", "../train.jsonl"))
    recipe = load_recipe(file)
    assert recipe.data.train == tmp_path / "train.jsonl"
    assert recipe.output.dir == Path.cwd() / "runs" / "x"


def test_a_base_directory_is_made_absolute_and_a_hub_id_is_kept(tmp_path: Path) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    source = tmp_path / "recipe.yaml"
    assert parse_recipe(NEEDED + "model: {base: models/tiny}", source).model.base == str(tmp_path / "models" / "tiny")
    assert parse_recipe(NEEDED + "model: {base: org/tiny}", source).model.base == "org/tiny"


# -------------------------------------------------------------------- round trip


def fields(**strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=strategies)


ranks = st.integers(0, 1024)
names = st.text("abcdefghijklmnop-_ .'\"#:", min_size=1, max_size=12).map(lambda text: f"/somewhere/x{text}x.jsonl")
experts = st.lists(st.integers(0, 127), min_size=1, max_size=6, unique=True)
adapters = fields(
    attention_rank=st.integers(1, 1024),
    shared_expert_rank=ranks,
    routed_experts_rank=st.integers(1, 1024),
    alpha=st.floats(1e-6, 8192),
)
shares = st.none() | st.floats(1e-9, 1)
some = st.integers(1, 10**12)
placements = st.one_of(
    fields(rule=st.sampled_from(["all_experts", "attention", "shared"]), profile_tokens=st.integers(1, 10**9)),
    fields(p=shares).map(lambda given: {"rule": "esft_gate", **given}),
    fields(fraction=shares, scope=st.sampled_from(["layer", "model"])).map(lambda g: {"rule": "top_fraction", **g}),
    st.builds(lambda key, size: {"rule": "budget", key: size}, st.sampled_from(["parameters", "training_bytes"]), some),
    (experts | st.dictionaries(st.integers(0, 99), experts, min_size=1, max_size=3)).map(
        lambda ids: {"rule": "manual", "experts": ids}
    ),
)
routers = st.one_of(
    fields(mode=st.just("frozen"), watch=st.booleans(), probe_examples=st.integers(1, 999)),
    fields(warn_kl=st.none() | st.floats(0, 9), stop_entropy=shares, warn_busiest=shares),
    fields(rank=st.integers(1, 1024), distill_coef=st.floats(0, 9)).map(lambda given: {"mode": "lora", **given}),
    fields(z_loss_coef=st.floats(0, 9), load_balance_coef=st.floats(0, 9)).map(lambda g: {"mode": "full", **g}),
)
lengths = st.fixed_dictionaries({"epochs": st.floats(1e-3, 1000)}) | st.fixed_dictionaries(
    {"max_steps": st.integers(1, 10**8)}
)
training = st.builds(
    lambda length, rest: {**length, **rest},
    lengths,
    fields(
        batch_size=st.integers(1, 4096),
        learning_rate=st.floats(1e-12, 1),
        lr_scheduler=st.sampled_from(["linear", "cosine", "constant"]),
        warmup_fraction=st.floats(0, 0.99),
        seed=st.integers(0, 2**32 - 1),
        gradient_checkpointing=st.booleans(),
        expert_path=st.sampled_from(["auto", "fast", "lean"]),
    ),
)


def with_preference(recipe: dict[str, Any], drawn: tuple[str, dict[str, Any]] | None) -> dict[str, Any]:
    if drawn is None:
        return recipe
    method, preference = drawn
    training = {**recipe.get("training", {}), "method": method}
    return {**recipe, "training": training, "preference": preference, "trl": {}}


preferences = st.one_of(
    fields(beta=st.floats(1e-6, 1000), loss_type=st.just("hinge") | st.just(["ipo"])).map(lambda p: ("cpo", p)),
    st.lists(st.sampled_from(["sigmoid", "robust", "sft"]), min_size=1, unique=True).map(
        lambda names: ("dpo", {"loss_type": names, "loss_weights": [0.5] * len(names)})
    ),
)
recipes = st.fixed_dictionaries(
    {
        "data": st.fixed_dictionaries({"train": names}, optional={"eval": st.none() | names}),
        "output": st.fixed_dictionaries({"dir": names.map(lambda name: f"/else{name}")}),
    },
    optional={
        "model": fields(
            quantization=st.sampled_from(["nf4", "fp4", "int8"]),
            double_quant=st.booleans(),
            int8_experts=st.lists(st.integers(0, 127), max_size=4, unique=True),
        )
        | fields(quantization=st.just("none")),
        "adapter": adapters,
        "placement": placements,
        "router": routers,
        "training": training,
        "evaluation": fields(examples=st.none() | st.integers(1, 10**6), generations=st.integers(0, 1000)),
        "trl": fields(
            neftune_noise_alpha=st.none() | st.floats(0, 10),
            packing=st.booleans(),
            optim_args=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8),
            optim_target_modules=st.lists(st.sampled_from(["null", "yes", "1e3", "~", "- a", "a: b"])),
        ),
    },
)
recipes = st.builds(with_preference, recipes, st.none() | preferences).map(Recipe.model_validate)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(recipes)
def test_yaml_of_a_recipe_reads_back_to_the_same_recipe(recipe: Recipe) -> None:
    text = recipe_to_yaml(recipe)
    assert parse_recipe(text) == recipe
    assert recipe_to_yaml(parse_recipe(text)) == text


def test_layer_numbers_stay_numbers_in_yaml_the_first_layer_too() -> None:
    recipe = parse_recipe(NEEDED + "placement: {rule: manual, experts: {0: [1, 2], 12: [3]}}")
    assert recipe.placement.experts == {0: (1, 2), 12: (3,)}
    assert "    0:\n" in recipe_to_yaml(recipe) and parse_recipe(recipe_to_yaml(recipe)) == recipe


# -------------------------------------------------------------------- what is refused, and how it is said


@pytest.mark.parametrize(
    ("text", "field", "line", "said"),
    [
        ("adapter:\n  alpah: 3\n", "adapter.alpah", 4, 'did you mean "alpha"?'),
        ("trainin: {}\n", "trainin", 3, 'did you mean "training"?'),
        ("model:\n  learning_rate: 1\n", "model.learning_rate", 4, "did you mean training.learning_rate?"),
        ("training:\n  packing: true\n", "training.packing", 4, "write it as trl.packing"),
        ("model:\n  zzz: 1\n", "model.zzz", 4, "allowed here: base, quantization, double_quant, int8_experts, dtype"),
        ("adapter:\n  attention_rank: '16'\n", "adapter.attention_rank", 4, 'received the text "16"; allowed: a whole'),
        ("adapter:\n  attention_rank: true\n", "adapter.attention_rank", 4, "received the boolean true"),
        ("adapter:\n  attention_rank: -1\n", "adapter.attention_rank", 4, "at least 0, at most 1024"),
        ("training:\n  batch_size: 1.5\n", "training.batch_size", 4, "received the number 1.5"),
        ("training:\n  learning_rate: .nan\n", "training.learning_rate", 4, "received the number nan"),
        ("training:\n  gradient_checkpointing: yes\n", "training.gradient_checkpointing", 4, "true or false"),
        ("training: 3\n", "training", 3, "received the number 3; allowed: a mapping"),
        ("model:\n  quantization: int4\n", "model.quantization", 4, "allowed: nf4 | fp4 | int8 | none"),
        ("model:\n  int8_experts: all\n", "model.int8_experts", 4, "allowed: a list of expert ids"),
        ("model:\n  int8_experts: [1, 1]\n", "model.int8_experts", 4, "received 1 more than once"),
        ("model:\n  quantization: none\n  int8_experts: [1]\n", "model", 3, "quantization is none"),
        ("training:\n  expert_path: slow\n", "training.expert_path", 4, "allowed: auto | fast | lean"),
        ("model:\n  base: embeded\n", "model.base", 4, 'did you mean "embedded"?'),
        ("adapter:\n  routed_experts: [1]\n", "adapter.routed_experts", 4, "placement: {rule: manual, experts: […]}"),
        ("adapter:\n  router_rank: 4\n", "adapter.router_rank", 4, "write router: {mode: lora, rank: …}"),
        (
            "adapter: {attention_rank: 0, shared_expert_rank: 0, routed_experts_rank: 0}\n",
            "adapter",
            3,
            "set at least one rank above 0",
        ),
        ("placement:\n  rule: random\n", "placement.rule", 4, "allowed: all_experts | attention | shared | esft_gate"),
        ("placement:\n  rule: esft_token\n  p: 0\n", "placement.p", 5, "a number, above 0, at most 1"),
        ("placement:\n  rule: esft_gate\n  p: 1.01\n", "placement.p", 5, "a number, above 0, at most 1"),
        ("placement:\n  p: 0.5\n", "placement", 3, "the rule is all_experts; p is read by esft_gate, esft_token"),
        ("placement: {rule: budget, parameters: 9, scope: model}\n", "placement", 3, "scope is read by top_fraction"),
        ("placement: {rule: manual, experts: [1], max_rank: 32}\n", "placement", 3, "max_rank is read by budget"),
        ("placement: {training_bytes: 100}\n", "placement", 3, "training_bytes is read by budget"),
        ("placement:\n  rule: budget\n", "placement", 3, "one of parameters and training_bytes"),
        ("placement: {rule: budget, parameters: 1, training_bytes: 1}\n", "placement", 3, "and only one"),
        ("placement: {rule: budget, parameters: 1, min_rank: 6}\n", "placement", 3, "multiples of rank_step"),
        ("placement: {rule: budget, parameters: 1, min_rank: 128}\n", "placement", 3, "min_rank at most max_rank"),
        ("placement:\n  rule: manual\n", "placement", 3, "needs experts"),
        ("placement:\n  rule: manual\n  experts: []\n", "placement.experts", 5, "allowed: a list of expert ids"),
        ("placement:\n  rule: manual\n  experts: [3, 1, 3]\n", "placement.experts", 5, "received 3 more than once"),
        ("placement:\n  rule: manual\n  experts: {x: [1]}\n", "placement.experts", 5, "received layers x; allowed"),
        ("placement:\n  rule: manual\n  experts: {1: [-1]}\n", "placement.experts", 5, "received [-1]"),
        ("placement: {rule: attention}\nadapter: {attention_rank: 0}\n", "adapter", 4, "nothing would be trained"),
        ("placement: {rule: shared}\nadapter: {dense_mlp_rank: 4}\n", "adapter", 4, "adapts no dense MLP"),
        (
            "placement: {rule: esft_token}\nadapter: {routed_experts_rank: 0}\n",
            "adapter",
            4,
            "routed_experts_rank is 0, but placement.rule esft_token chooses experts",
        ),
        ("router:\n  load_balance_coef: 0.01\n", "router", 3, "set router.mode to lora or full"),
        ("router: {z_loss_coef: 1, distill_coef: 1}\n", "router", 3, "distill_coef, z_loss_coef is set but the router"),
        ("router: {mode: full, rank: 4}\n", "router", 3, "rank is read by lora"),
        ("router: {watch: false, stop_kl: 1}\n", "router", 3, "stop_kl is set but watch is false"),
        ("router:\n  warn_busiest: 2\n", "router.warn_busiest", 4, "at most 1"),
        ("training: {epochs: 1, max_steps: 5}\n", "training", 3, "give either epochs or max_steps"),
        ("training: {epochs: null}\n", "training", 3, "give either epochs or max_steps"),
        ("trl:\n  learning_rate: 1e-4\n", "trl.learning_rate", 4, "set training.learning_rate"),
        ("trl:\n  hub_token: abc\n", "trl.hub_token", 4, "a recipe holds no tokens"),
        ("trl:\n  trust_remote_code: true\n", "trl.trust_remote_code", 4, "never runs code that ships with a model"),
        ("trl:\n  neftune_alpha: 5\n", "trl.neftune_alpha", 4, 'did you mean "neftune_noise_alpha"?'),
        ("trl:\n  packing: 'yes'\n", "trl.packing", 4, 'received the text "yes", TRL allows bool'),
        ("trl:\n  neftune_noise_alpha: true\n", "trl.neftune_noise_alpha", 4, "TRL allows float or null"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_what_is_allowed(text: str, field: str, line: int, said: str) -> None:
    problem = only_problem(NEEDED + text)
    assert (problem.field, problem.line) == (field, line)
    assert said in problem.message


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("model:\n  base: [1\n", 3, "not valid YAML"),
        ("model:\n\tbase: x\n", 2, "not valid YAML"),
        ("model: {}\nmodel: {}\n", 2, 'duplicate key "model"'),
        ("- a\n- b\n", None, "received a list of 2"),
        ("", None, "received nothing (null)"),
        ("embedded\n", None, 'received the text "embedded"'),
        ("a: &x 1\nb: *x\n", 1, "write the value itself"),
        ("a: !!python/object:os.system 1\n", 1, "is not allowed"),
        ("a: 1\n---\nb: 2\n", 2, "not valid YAML"),
        ("a: \x00\n", None, "not valid YAML"),
        ("[" * 100_000, 1, "nested more than 20 levels deep"),
        ("a" * 200_001, None, "at most 200,000"),
    ],
)
def test_text_that_is_no_mapping_is_refused_with_its_line(text: str, line: int | None, said: str) -> None:
    problem = only_problem(text)
    assert problem.line == line
    assert said in problem.message


def test_all_problems_are_reported_together_in_file_order() -> None:
    problems = problems_of("model:\n  bse: x\nadapter:\n  alpha: big\ntraining:\n  seed: -1\ntrl:\n  nope: 1\n")
    assert [p.line for p in problems] == [None, None, 2, 4, 6, 8]
    assert [p.field for p in problems][:2] == ["data", "output"]
    assert problems[1].message == "is missing. Where the job and its adapter go"


def test_a_missing_field_says_what_belongs_there() -> None:
    problem = only_problem("data: {}\noutput: {dir: x}\n")
    assert (problem.field, problem.line) == ("data.train", 1)
    assert "File or folder of training rows" in problem.message


def test_the_message_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(NEEDED + "model: {bas: x}\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml: 1 problem\n  - line 3, model\.bas: unknown key"):
        load_recipe(file)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(RecipeError, match="line 2: is not UTF-8 text"):
        load_recipe(tmp_path / "binary.yaml")


# -------------------------------------------------------------------- schema and TRL options


def test_every_field_has_a_description_and_none_takes_code_or_secrets() -> None:
    schema = recipe_schema()
    sections = [schema, *schema["$defs"].values()]
    properties = {name: entry for section in sections for name, entry in section.get("properties", {}).items()}
    for name, entry in properties.items():
        section = schema["$defs"].get(entry.get("$ref", "").rsplit("/", 1)[-1], {})
        assert entry.get("description") or section.get("description"), name
    assert not {name for name in properties if "trust" in name or name.endswith("_token")}
    assert len(properties) <= 130


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("preference: {beta: 0.3}", "preference.beta", "training.method is sft; it is read by dpo, kto, orpo, cpo"),
        ("training: {method: dpo}\npreference: {loss_type: sigmod}", "preference.loss_type", 'did you mean "sigmoid"?'),
        ("training: {method: kto}\npreference: {loss_type: [kto, kto]}", "preference.loss_type", "and kto takes one"),
        ("training: {method: dpo}\npreference: {loss_type: [ipo, ipo]}", "preference.loss_type", "names a loss twice"),
        (
            "training: {method: orpo}\npreference: {loss_type: [sigmoid]}",
            "preference.loss_type",
            "read by dpo, kto, cpo",
        ),
        ("training: {method: dpo}\npreference: {loss_weights: [1, 2]}", "preference.loss_weights", "2 weights for 1"),
        ("training: {method: dpo}\npreference: {label_smoothing: 0.1}", "preference.label_smoothing", "read by robust"),
        ("training: {method: dpo}\npreference: {loss_type: exo_pair}", "preference.label_smoothing", "above 0"),
        ("training: {method: dpo}\ntrl: {beta: 0.2}", "trl.beta", "set preference.beta"),
        ("training: {method: dpo}\ntrl: {sync_ref_model: true}", "trl.sync_ref_model", "with the adapters off"),
        ("training: {method: orpo}\ntrl: {packing: true}", "trl.packing", "TRL's ORPOConfig has no such option"),
        ("trl: {packing_strategy: wrapped}", "trl.packing_strategy", "lets them see each other"),
        ("trl: {padding_free: true}", "trl.padding_free", "packing: true"),
    ],
)
def test_what_a_method_does_not_read_is_refused(text: str, field: str, words: str) -> None:
    problem = only_problem(f"{NEEDED}{text}\n")
    assert problem.field == field and words in problem.message
    assert problem.line is not None


@pytest.mark.parametrize("text", ["{method: dpo, loss_on: all}", "{method: kto, batch_size: 1}"])
def test_what_a_method_cannot_train_with_is_refused(text: str) -> None:
    assert only_problem(f"{NEEDED}training: {text}\n").field == "training"


def test_the_losses_of_the_recipe_are_trls() -> None:
    """Each name is in the source of the method's trainer, and every loss that DPO's source knows has its name here."""
    folder = Path(importlib.util.find_spec("trl").origin).parent  # type: ignore[union-attr,arg-type]
    for method in METHODS.values():
        source = (folder / method.config[0].replace("_config", "_trainer")).read_text()
        for loss in method.losses:
            assert f'"{loss}"' in source
    known = re.findall(r'loss_type == "(\w+)"', (folder / "trainer/dpo_trainer.py").read_text())
    assert sorted(METHODS["dpo"].losses) == sorted(known)


def test_trl_options_come_from_all_three_sources() -> None:
    options = trl_options("sft")
    assert {"packing", "use_liger_kernel", "neftune_noise_alpha", "adam_beta1"} <= options.keys()
    assert options["packing"] == "bool"
    assert trl_problem("adam_beta1", 0.8) is None


def test_every_refused_trl_option_exists_or_once_did() -> None:
    """A misspelt name in the tables would refuse nothing."""
    known = {*(name for method in METHODS for name in trl_options(method)), "warmup_ratio"}
    assert RECIPE_FIELDS.keys() | SAMPLING_FIELDS.keys() <= known
    for pattern in REASONS:
        assert any(name.startswith(pattern.rstrip("*")) for name in known), pattern


def test_every_owned_trl_option_points_to_a_field_of_the_recipe() -> None:
    recipe = parse_recipe(NEEDED)
    for field in (*RECIPE_FIELDS.values(), *SAMPLING_FIELDS.values(), *PREFERENCE_FIELDS.values()):
        section, name = field.split(".")
        assert name in type(getattr(recipe, section)).model_fields


def test_an_option_is_pointed_to_a_section_that_its_method_reads() -> None:
    for method in ("grpo", "rloo", "rejection"):
        assert "set sampling.max_new_tokens" in str(trl_problem("max_completion_length", 9, method))
    for method in ("orpo", "cpo"):
        assert "data.max_length_tokens" in str(trl_problem("max_completion_length", 9, method))
    assert "no such option" in str(trl_problem("temperature", 1.0, "sft"))


# -------------------------------------------------------------------- the recipes that ship


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_complete_and_can_be_planned(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.output.dir.name == path.stem
    profile = profile_of() if needs_profile(recipe) else None
    assert make_plan(recipe, profile=profile).trainable_parameters > 0


def test_recipes_ship() -> None:
    assert "quickstart" in {path.stem for path in RECIPES}
