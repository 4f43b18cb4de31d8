"""Who may import whom, what loads nothing heavy, and the one list of public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import studio

ROOT = Path(__file__).parents[2]
PACKAGES = ("adapters", "studio", "ui")
HEAVY = {"torch", "transformers", "datasets", "peft", "trl", "accelerate", "gradio", "pandas", "numpy", "bitsandbytes"}
WORDING = {"studio.preference_view", "studio.progress", "studio.quantities"}
LIGHT = (
    "studio",
    "studio.cli",
    "studio.recipe",
    "studio.generations",
    "studio.rewards",
    "studio.rewards.choosing",
    "studio.rewards.code_child",
    "studio.ranking",
    "studio.score_head",
    "studio.rewards.samples",
    "studio.data",
    "studio.data.inspection",
    "studio.data.tables",
    "studio.data_view",
    "studio.data.curriculum",
    "studio.data.leakage",
    "studio.data.streaming",
    "studio.recipe_mixture",
    "studio.mixture_view",
    "studio.jobs",
    "studio.worker",
    "studio.metrics",
    "studio.gate",
    "studio.measurable",
    "studio.json_answers",
    "studio.evaluation_inputs",
    "studio.evaluating",
    "studio.metric_view",
    "studio.defaults",
    "studio.lr_test",
    "studio.sweep",
    "studio.sweep_run",
    "studio.sweep_space",
    "studio.hyper_view",
    "studio.plan",
    "studio.plan_warnings",
    "studio.beside",
    "studio.methods",
    "studio.packed_plan",
    "studio.preference_losses",
    "studio.preference_view",
    "studio.placing",
    "studio.starting",
    "studio.models",
    "studio.merging",
    "studio.merge_choice",
    "adapters.journal",
    "studio.certificate",
    "studio.checking",
    "studio.card",
    "studio.licence",
    "studio.held_out",
    "studio.calibration",
    "studio.verifying",
    "studio.pushing",
    "studio.combining",
    "studio.exporting",
    "studio.export_origin",
    "studio.export_plan",
    "studio.export_sizes",
    "studio.export_view",
    "studio.terminal",
    "studio.follow",
    "adapters",
    "adapters.errors",
    "adapters.layouts",
    "adapters.placement",
    "adapters.workspace",
    "adapters.packed_cache",
    "adapters.export",
    "adapters.export.consumers",
    "adapters.export.ollama",
    "adapters.verify.go_template",
    "adapters.verify.ollama_files",
    "adapters.verify",
    "adapters.verify.run",
    "adapters.verify.tokenizer",
)


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The top-level package of every import in the file, inside functions and type checks too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield (node.module or "").split(".")[0]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


FILES = [path for package in PACKAGES for path in sources(package)]


def test_there_are_files_to_look_at() -> None:
    assert all(sources(package) for package in PACKAGES)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_layers_import_downwards_alone(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    above = {"adapters": {"studio", "ui"}, "studio": {"ui"}, "ui": {"adapters"}}[package]
    if path == ROOT / "studio" / "cli.py":
        above = set()  # `studio ui` starts the application
    assert not above & set(imported(path))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_trl_is_imported_by_the_trainers_and_gradio_by_the_ui_alone(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    found = set(imported(path))
    assert "trl" not in found or parts[:2] == ("studio", "trainers")
    assert "gradio" not in found or parts[0] == "ui"


@pytest.mark.parametrize("path", sources("ui"), ids=name)
def test_the_ui_uses_the_public_names_of_studio_and_its_wording_alone(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "studio":
            assert {alias.name for alias in node.names} <= {*studio.__all__, "__version__"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("studio."):
            assert node.module in WORDING, f"{name(path)} imports {node.module}"


@pytest.fixture(scope="module")
def loaded_by() -> dict[str, set[str]]:
    """For each light module, the heavy packages that its import loads, each in a fresh process."""
    code = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*{m.split('.')[0] for m in sys.modules})"
    started = {
        module: subprocess.Popen([sys.executable, "-c", code, module], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for module in LIGHT
    }
    return {module: set(process.communicate()[0].split()) for module, process in started.items()}


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_nothing_heavy(loaded_by: dict[str, set[str]], module: str) -> None:
    assert module.split(".")[0] in loaded_by[module], "the import failed"
    assert not HEAVY & loaded_by[module]


def test_the_package_alone_loads_none_of_its_modules(loaded_by: dict[str, set[str]]) -> None:
    assert not {"pydantic", "ruamel", "typer", "rich"} & loaded_by["studio"]


def test_every_public_name_resolves_and_the_list_is_the_whole_of_it() -> None:
    assert studio.__all__ == sorted(set(studio.__all__))
    for public in studio.__all__:
        assert getattr(studio, public).__module__.split(".")[0] in PACKAGES
    assert {*studio.__all__, "__version__"} == set(dir(studio))
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = studio.no_such_name


def test_every_error_of_the_tree_is_public() -> None:
    from studio import errors

    assert set(errors.__all__) <= set(studio.__all__)


def test_type_checkers_see_the_same_names_as_the_lazy_lookup() -> None:
    tree = ast.parse((ROOT / "studio" / "__init__.py").read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    names = [alias.name for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(names) == studio.__all__
