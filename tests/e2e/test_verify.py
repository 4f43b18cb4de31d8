"""An export verified again and pushed, by the command line; and a faulty writer, whose output never appears."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import merge as writer
from adapters.export import Options, Progress, Source
from adapters.loading import load_base
from adapters.lora import attach
from adapters.peft_files import save_adapter
from adapters.placement import Placement
from studio import ExportRequest, VerificationError, export
from studio.certificate import read_certificate
from tests.e2e.conftest import build_base, studio

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny base and an adapter on all its classes."""
    folder = tmp_path_factory.mktemp("trained")
    base = build_base("qwen3_moe", folder / "base")
    placement = Placement(attention=2, routed=((2, 2, 0, 2),) * 2, alpha=2)
    model = attach(load_base(base, quantize="none"), placement)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.2)
    save_adapter(model, placement, folder / "adapter", base_name=str(base))
    return base, folder / "adapter"


def test_an_export_is_verified_again_and_pushed_by_the_command_line(trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = trained
    out, prompts = tmp_path / "tiny", tmp_path / "prompts.txt"
    prompts.write_text("Pump PMP-2041 at Norwick leaks oil.\nThe quick brown fox.\n")
    made = studio("export", adapter, "--for", "transformers", "--out", out, "--prompts", prompts, "--json")
    assert made.returncode == 0, made.stdout + made.stderr
    assert json.loads(made.stdout)["verdict"] == "verified"
    assert read_certificate(out).prompts == "the first 2 lines of prompts.txt"

    again = studio("verify", out, "--base", base, "--adapter", adapter, "--prompts", prompts, "--json")
    assert again.returncode == 0, again.stdout + again.stderr
    assert {check["status"] for check in json.loads(again.stdout)["checks"]} == {"passed"}

    pushed = studio("push", out, "me/tiny", "--dry-run")
    assert pushed.returncode == 0 and "dry run" in pushed.stdout and "only you" in pushed.stdout

    with (out / WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x00")
    changed = studio("verify", out)
    assert changed.returncode == 1 and f"{WEIGHTS} has changed" in changed.stdout
    refused = studio("push", out, "me/tiny", "--dry-run")
    assert refused.returncode == 1 and "not as it was certified" in refused.stderr


def test_what_a_faulty_writer_leaves_never_appears(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = writer.write_safetensors

    def without_one_expert(source: Source, directory: Path, options: Options, progress: Progress | None) -> object:
        facts = right(source, directory, options, progress)
        base, merged = load_file(source.base / WEIGHTS), load_file(directory / WEIGHTS)
        lost = {key: base[key] for key in merged if ".layers.1." in key and ".experts.3." in key}
        assert len(lost) == 3
        save_file(merged | lost, directory / WEIGHTS, metadata={"format": "pt"})
        return facts

    monkeypatch.setattr(writer, "write_safetensors", without_one_expert)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(VerificationError, match=r"experts\.3\.") as caught:
        export(ExportRequest(str(trained[1]), out / "tiny", "transformers"))
    assert {check.status for check in caught.value.checks} == {"passed", "failed"}
    assert not list(out.iterdir()), "nothing of it is left"
