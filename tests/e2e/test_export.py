"""A real job, exported: folders that their programs load, certified; and what is left when one fails or is stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import studio
from studio import ExportRequest, StudioError, VerificationError
from studio.base import EMBEDDED_DIR
from tests.e2e.conftest import studio as command_line
from tests.e2e.conftest import write_recipe
from ui.exporting import Exports, Run

STOCK = Path(__file__).with_name("stock_check.py")
QUESTION = "Pump PMP-2041 at Norwick leaks oil."
SECONDS = 120.0


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    done = command_line("run", write_recipe(folder / "r.yaml"), "--json")
    assert done.returncode == 0, done.stderr
    return folder / "job"


def exported(job: Path, out: Path, *options: str) -> dict[str, Any]:
    done = command_line("export", job, "--out", out, "--json", *options)
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == 0, report
    return report


def failures(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [check for check in report["checks"] if check["status"] != "passed"]


def ask(folder: Path, *options: str) -> str:
    """The export's own script, in a process that finds nothing of the studio."""
    command = [sys.executable, "-I", str(folder / "run.py"), QUESTION, "--tokens", "8", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_for_transformers_it_is_a_model_that_stock_loads_and_that_is_the_trained_one(job: Path, tmp_path: Path) -> None:
    out = tmp_path / "pumps"
    report = exported(job, out, "--for", "transformers", "--dtype", "float32", "--into", "original")
    assert report["verdict"] == "verified" and not failures(report)
    command = [sys.executable, "-I", str(STOCK), str(EMBEDDED_DIR), str(job / "adapter"), str(out)]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout)
    assert said["adapter_minus_merged"] < 1e-3 < 0.1 < said["adapter_minus_base"] and said["chat_template"]
    assert ask(out)
    everything_is_certified(out, report)
    for text in (out / "README.md", out / "certificate.json"):
        assert str(job.parent) not in text.read_text() and str(EMBEDDED_DIR) not in text.read_text()
    assert "python ./run.py" in (out / "README.md").read_text()


def everything_is_certified(out: Path, report: dict[str, Any]) -> None:
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {*report["files"], "certificate.json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*") if path.is_file()} == {0o644}
    read = studio.read_export(out)
    assert read["checks"] == report["checks"] and read["command"] == report["command"]
    assert [export["out"] for export in studio.list_exports(out.parent)] == [str(out)]


def test_an_adapter_for_peft_answers_by_its_own_script(job: Path, tmp_path: Path) -> None:
    report = exported(job, tmp_path / "pumps", "--for", "peft")
    assert report["verdict"] == "verified" and not failures(report)
    python, script, question, *options = shlex.split(report["command"])
    assert (python, script, question) == ("python", str(tmp_path / "pumps" / "run.py"), "your question")
    assert options == shlex.split(studio.read_export(tmp_path / "pumps")["command"])[3:]
    assert ask(Path(script).parent, *options)


@pytest.mark.parametrize("form", ["peft", "per-expert", "vllm-3d", "sglang-3d", "gguf-lora", "compact"])
def test_no_form_of_an_adapter_names_a_place_on_this_machine(job: Path, tmp_path: Path, form: str) -> None:
    exported(job, tmp_path / "pumps", "--format", form, "--no-verify")
    for file in (tmp_path / "pumps").iterdir():
        assert str(EMBEDDED_DIR).encode() not in file.read_bytes(), file.name


def test_for_ollama_it_is_a_quantised_file_and_a_modelfile_proven_in_llama_cpp(job: Path, tmp_path: Path) -> None:
    report = exported(job, tmp_path / "pumps", "--for", "ollama", "--quant", "q8_0")
    losses = report["facts"]["into"]["losses"]  # measured, as nobody said what to merge into
    assert report["facts"]["into"]["chosen"] == min(losses, key=losses.get) and len(losses) == 2
    assert not [check for check in report["checks"] if check["status"] == "failed"]
    names = {check["name"] for check in report["checks"] if check["status"] == "passed"}
    assert names >= {"Ollama template", "Ollama stop strings", "loads in llama.cpp", "behaviour: as the trained model"}
    assert (tmp_path / "pumps" / "Modelfile").read_text().startswith("FROM ./pumps-Q8_0.gguf\n")
    everything_is_certified(tmp_path / "pumps", report)


def test_lm_studio_finds_its_two_folders_and_what_was_not_verified_says_so(job: Path, tmp_path: Path) -> None:
    rows = tmp_path / "tickets.csv"
    rows.write_text("question,answer\n" + "Pump PMP-2041 at Norwick leaks.,Norwick\n" * 3)
    options = ("--no-verify", "--into", "original", "--importance", str(rows))
    report = exported(job, tmp_path / "pumps", "--for", "lm-studio", "--quant", "Q4_0", *options)
    assert report["verdict"] == "not verified"
    assert report["facts"]["importance"] and report["options"]["importance"] == "tickets.csv"
    assert "moe-studio/pumps/pumps-Q4_0.gguf" in report["files"]
    assert (tmp_path / "pumps" / "moe-studio" / "pumps" / "pumps-Q4_0.gguf").is_file()


# -------------------------------------------------------------------- failed, stopped


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that loses what one expert has learnt."""
    from adapters import merge

    right: Callable[..., dict[str, Any]] = merge.write_safetensors

    def wrong(source: Any, directory: Path, *rest: Any) -> dict[str, Any]:
        facts = right(source, directory, *rest)
        file = directory / "model.safetensors"
        tensors, base = load_file(file), load_file(EMBEDDED_DIR / "model.safetensors")
        name = "model.layers.1.feed_forward.experts.down_proj"
        changed = (tensors[name] - base[name]).float().flatten(1).norm(dim=1)
        assert changed.max() > 0
        tensors[name][changed.argmax()] = base[name][changed.argmax()]
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, {"format": "pt"})
        return facts

    monkeypatch.setattr(merge, "write_safetensors", wrong)


def test_a_failed_check_leaves_the_output_as_it_was(job: Path, tmp_path: Path, faulty: None) -> None:
    request = ExportRequest(str(job), tmp_path / "pumps", "transformers", into="original", overwrite=True)
    (tmp_path / "pumps").mkdir()
    (tmp_path / "pumps" / "certificate.json").write_text("of the old one")
    with pytest.raises(VerificationError, match="was not written: 1 of") as raised:
        studio.export(request)
    assert [check.name for check in raised.value.checks if check.status == "failed"] == [
        "weights: every targeted tensor changed as trained"
    ]
    assert [path.name for path in tmp_path.rglob("*")] == ["pumps", "certificate.json"]
    assert (tmp_path / "pumps" / "certificate.json").read_text() == "of the old one"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


def test_ctrl_c_leaves_nothing(job: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "studio.cli",
        "export",
        str(job),
        "--for",
        "vllm",
        "--out",
        str(tmp_path / "pumps"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: any(tmp_path.rglob("model.safetensors")))  # written, now it is being verified
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode != 0 and "Traceback" not in said
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------- from the browser


def ended(exports: Exports) -> Run:
    wait_for(lambda: (run := exports.now()) is not None and run.ended)
    run = exports.now()
    assert run is not None
    return run


def test_the_apps_process_says_how_far_it_is_and_can_be_stopped(job: Path, tmp_path: Path) -> None:
    exports, request = Exports(), ExportRequest(str(job), tmp_path / "pumps", "transformers", into="original")
    exports.start(request)
    with pytest.raises(StudioError, match="one export runs at a time"):
        exports.start(request)
    wait_for(lambda: (run := exports.now()) is not None and run.stage.startswith("Verifying"))
    exports.cancel()
    assert ended(exports).status == "cancelled"
    assert not list(tmp_path.iterdir())
    wait_for(lambda: not multiprocessing.active_children())


def test_what_goes_wrong_in_the_apps_process_comes_back(job: Path, tmp_path: Path) -> None:
    exports = Exports()
    exports.start(ExportRequest(str(job), tmp_path / "pumps", "transformers", format="gguf"))
    assert (run := ended(exports)).status == "failed" and "transformers reads safetensors" in run.error
    wait_for(lambda: not multiprocessing.active_children())
    exports.start(ExportRequest(str(job), tmp_path / "pumps", "transformers", into="original"))
    wait_for(lambda: bool(multiprocessing.active_children()))
    (child,) = multiprocessing.active_children()
    os.kill(child.pid or 0, signal.SIGKILL)
    assert (run := ended(exports)).status == "failed" and "exit code -9" in run.error
