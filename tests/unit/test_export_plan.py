"""What an export will be, and everything that is refused before a byte is written. No weights are read."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console
from typer.testing import CliRunner

import studio
from adapters.export import EXPORTERS, Options, Source
from adapters.export.consumers import CONSUMERS, Place
from adapters.fingerprint import fingerprint
from adapters.sidecar import Sidecar, read_sidecar, write_sidecar
from studio import AdapterFileError, ExportError, ExportRequest, OutputExistsError, StudioError, exporting
from studio.base import EMBEDDED_DIR
from studio.calibration import calibration, handed_over
from studio.cli import app
from studio.export_sizes import GGUF_BITS
from studio.export_view import certificate_view, export_progress

HELD = {"quantization": "nf4", "int8_experts": [], "double_quant": True, "dtype": "float32"}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter directory as far as a plan reads it: config, sidecar, and a file of weights for its size."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"base_model_name_or_path": str(EMBEDDED_DIR), "r": 4, "rank_pattern": {"experts": 24}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(bytes(1000))
    sidecar = Sidecar("peft", "embedded", dict(fingerprint(EMBEDDED_DIR)), HELD, "0.21.2", "llama4_text", {"count": 16})
    write_sidecar(folder, sidecar)
    return folder


def request(adapter: Path, consumer: str | None = "transformers", **changes: object) -> ExportRequest:
    return dataclasses.replace(ExportRequest(str(adapter), adapter.parent / "out" / "pumps", consumer), **changes)


def test_a_plan_says_what_will_be_written_and_writes_nothing(adapter: Path) -> None:
    before = sorted(adapter.parent.rglob("*"))
    plan = studio.plan_export(request(adapter))
    assert sorted(adapter.parent.rglob("*")) == before
    weights = sum(file.stat().st_size for file in EMBEDDED_DIR.glob("*.safetensors"))
    assert 0.98 < plan.bytes / weights < 1.02
    assert plan.format.name == "safetensors" and plan.name == "pumps" and plan.checks
    assert plan.source().adapter == adapter and plan.chooses
    assert json.loads(json.dumps(plan.as_json()))["command"].startswith("python ")


def test_what_to_merge_into_is_measured_where_nobody_says_it_and_training_quantised(adapter: Path) -> None:
    assert not studio.plan_export(request(adapter, into="quantized")).chooses
    assert not studio.plan_export(request(adapter, "peft")).chooses
    assert not studio.plan_export(request(adapter, what="embedded")).chooses
    sidecar = read_sidecar(adapter)
    assert sidecar and sidecar.held == HELD
    write_sidecar(adapter, dataclasses.replace(sidecar, held={**HELD, "quantization": "none"}))
    assert not studio.plan_export(request(adapter)).chooses


@pytest.mark.parametrize(("quant", "bits"), [("F32", 32), ("Q8_0", 8.5), ("Q4_K_M", 4.9)])
def test_a_gguf_is_planned_by_the_bits_of_its_type(adapter: Path, quant: str, bits: float) -> None:
    plan = studio.plan_export(request(adapter, "ollama", quant=quant))
    assert plan.bytes == pytest.approx(5_327_104 * bits / 8, rel=0.1)
    assert f"{quant} weights" in plan.files[0][0]
    assert not plan.warnings


def test_the_types_that_are_offered_are_those_that_can_be_written() -> None:
    from adapters.export.gguf_types import QUANTS

    assert set(GGUF_BITS) == set(QUANTS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"consumer": None}, "say what it is for"),
        ({"consumer": "olama"}, "received --for olama; allowed are transformers"),
        ({"format": "gguf"}, "received --format gguf; transformers reads safetensors"),
        ({"quant": "Q4_0"}, "are for the format gguf"),
        ({"consumer": "ollama", "dtype": "float16"}, "--dtype is for the format safetensors"),
        ({"consumer": "ollama", "quant": "Q9_9"}, "received --quant Q9_9; allowed are F32"),
        ({"dtype": "int8"}, "received --dtype int8; allowed are bfloat16"),
        ({"into": "best"}, "received --into best; allowed are auto, original, quantized"),
        ({"consumer": "peft", "into": "quantized"}, "--into is for merged models"),
        ({"prompts": Path("nowhere.jsonl")}, "nowhere.jsonl does not exist"),
        ({"what": str(EMBEDDED_DIR), "consumer": "peft"}, "is a model without an adapter"),
        ({"what": str(EMBEDDED_DIR), "into": "quantized"}, "is a model without an adapter"),
        ({"what": str(EMBEDDED_DIR), "base": "embedded"}, "is no adapter and no job"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_is_allowed(
    adapter: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ExportError) as raised:
        studio.plan_export(request(adapter, **changes))  # type: ignore[arg-type]
    assert words in str(raised.value)


def test_prompts_that_cannot_be_read_are_refused_before_anything_is_written(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "rows.jsonl").write_text("no json\n")
    for name in ("empty.txt", "rows.jsonl"):
        with pytest.raises(StudioError, match=name):
            studio.plan_export(request(adapter, prompts=tmp_path / name))


def test_what_matters_is_measured_on_any_data_that_can_be_trained_on(adapter: Path, tmp_path: Path) -> None:
    origin = studio.plan_export(request(adapter)).origin
    user, assistant = ({"role": role, "content": said} for role, said in (("user", "Leaks?"), ("assistant", "Yes.")))
    rows = tmp_path / "rows.csv.gz"
    rows.write_bytes(gzip.compress(b"question,chosen,rejected\nLeaks?,Yes.,No.\n"))
    assert calibration(rows, origin) == ([user, assistant],)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.md").write_text("one\ntwo\n")
    assert calibration(folder, origin) == ("one\ntwo\n",) and calibration(folder / "a.md", origin) == ("one", "two")
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "a"}) + "\n" + (json.dumps({"text": "b"}) + "\n") * 600 + "no json\n")
    assert len(calibration(long, origin)) == 512
    with handed_over(Options(importance=rows), origin) as options:
        assert options.importance and options.importance != rows
        assert json.loads(options.importance.read_text()) == {"messages": [user, assistant]}
    assert not options.importance.exists()
    matrix = tmp_path / "imatrix.gguf"
    matrix.write_bytes(b"GGUF")
    with handed_over(Options(importance=matrix), origin) as options:
        assert options.importance == matrix


def test_what_the_job_trained_on_is_read_as_it_read_it(adapter: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"ask": "a", "reply": "b"}\nno json\n')
    origin = studio.plan_export(request(adapter)).origin
    with pytest.raises(StudioError, match="line 1: needs messages"):
        calibration(rows, origin)
    data = f"train: '{rows}', columns: {{prompt: ask, completion: reply}}, bad_rows: drop"
    recipe = studio.parse_recipe(f"data: {{{data}}}\noutput: {{dir: x}}\n")
    trained = dataclasses.replace(origin, job=cast(Any, SimpleNamespace(recipe=lambda: recipe)))
    ((ask, reply),) = calibration(rows, trained)
    assert (ask, reply) == ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


@pytest.mark.parametrize(("name", "text"), [("rows.jsonl", "no json\n"), ("empty.txt", "\n"), ("missing.csv", None)])
def test_examples_that_cannot_be_read_are_refused_before_anything_is_written(
    adapter: Path, tmp_path: Path, name: str, text: str | None
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(StudioError, match=name):
        studio.plan_export(request(adapter, "ollama", importance=tmp_path / name))


@pytest.mark.parametrize(
    ("consumer", "name", "file"),
    [
        ("llama.cpp-adapter", "my pumps", "my-pumps-lora.gguf"),
        ("llama.cpp", "my pumps", "my-pumps-Q4_K_M.gguf"),
    ],
)
def test_the_command_names_the_gguf_file_that_is_written(
    adapter: Path, tmp_path: Path, consumer: str, name: str, file: str
) -> None:
    pytest.importorskip("gguf")
    plan = studio.plan_export(request(adapter, consumer, out=tmp_path / name))
    assert f"/{file}" in plan.command


@pytest.mark.parametrize("consumer", ["vllm", "sglang"])
def test_what_stood_in_for_a_program_is_said_by_what_it_loaded(tmp_path: Path, consumer: str) -> None:
    check = CONSUMERS[consumer].check
    assert check is not None
    (tmp_path / "config.json").write_text("{}")
    (plain,) = check(Source(EMBEDDED_DIR, None, "a"), tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors"}}')
    (fp8,) = check(Source(EMBEDDED_DIR, None, "a"), tmp_path)
    assert "not the files" in fp8.detail and "not the files" not in plain.detail and fp8.status == "not run"


def test_a_base_that_has_changed_since_the_training_is_refused(adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(EMBEDDED_DIR, base)
    studio.plan_export(request(adapter, base=str(base)))  # the same model in another place
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    with pytest.raises(AdapterFileError, match="differs from it in its config"):
        studio.plan_export(request(adapter, base=str(base)))


def test_another_chat_template_is_said_and_not_refused(adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(EMBEDDED_DIR, base)
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (warning,) = studio.plan_export(request(adapter, base=str(base))).warnings
    assert "chat template has changed" in warning


def test_a_disk_that_is_too_small_is_said_with_both_sizes(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=5_000_000))
    with pytest.raises(ExportError, match=r"needs about 10\.9 MB, and 5\.00 MB are free"):
        studio.plan_export(request(adapter))


def test_only_an_export_is_ever_overwritten(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "pumps"
    out.mkdir(parents=True)
    with pytest.raises(OutputExistsError, match="exists already"):
        studio.plan_export(request(adapter))
    studio.plan_export(request(adapter, overwrite=True))  # empty
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="never overwritten"):
        studio.plan_export(request(adapter, overwrite=True))
    (out / "certificate.json").write_text("{}")
    studio.plan_export(request(adapter, overwrite=True))
    (out.parent / "link").symlink_to(out)
    with pytest.raises(OutputExistsError, match="never overwritten"):
        studio.plan_export(request(adapter, overwrite=True, out=out.parent / "link"))


@pytest.mark.parametrize("place", ["adapter", "."])
def test_what_is_being_exported_is_never_the_output(adapter: Path, tmp_path: Path, place: str) -> None:
    with pytest.raises(OutputExistsError, match="holds what is being exported"):
        studio.plan_export(request(adapter, out=tmp_path / place, overwrite=True))


def test_a_llama_licence_asks_for_its_name(adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(EMBEDDED_DIR, base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: llama4\n---\n")
    (base / "LICENSE").write_text("LLAMA 4 COMMUNITY LICENSE AGREEMENT")
    with pytest.raises(ExportError, match="Llama-pumps"):
        studio.plan_export(request(adapter, base=str(base)))
    plan = studio.plan_export(request(adapter, base=str(base), out=tmp_path / "out" / "Llama-pumps"))
    assert plan.source().name == "Llama-pumps"


def test_a_compact_adapter_says_how_to_go_on(adapter: Path) -> None:
    (adapter / "compact_adapter.safetensors").touch()
    with pytest.raises(AdapterFileError, match="studio convert"):
        studio.plan_export(request(adapter))


# -------------------------------------------------------------------- on the command line


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(adapter: Path, tmp_path: Path) -> None:
    wanted = ["export", str(adapter), "--for", "ollama", "--out", str(tmp_path / "pumps"), "--dry-run"]
    said = CliRunner().invoke(app, wanted, env={"COLUMNS": "160"})
    assert said.exit_code == 0 and not (tmp_path / "pumps").exists()
    for words in (
        "Q4_K_M weights",
        "Modelfile",
        "llama.cpp in a fresh process",
        "ollama create pumps",
        "held-out loss",
    ):
        assert words in said.output
    plain = json.loads(CliRunner().invoke(app, [*wanted, "--json", "--no-verify"]).output)
    assert plain["consumer"] == "ollama" and plain["options"] == {"quant": "Q4_K_M"} and plain["checks"] == []


def test_the_certificate_in_the_terminal_says_what_was_not_run() -> None:
    checks = [
        {"name": "weights", "status": "passed", "detail": "all there \x1b[2J", "measured": {}},
        {"name": "behaviour", "status": "not run", "detail": "too large for this machine", "measured": {}},
    ]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(certificate_view({"out": "exports/a", "command": "run a", "checks": checks, "facts": {}}))
    said = console.export_text()
    assert "1 check passed, none failed; not run: behaviour" in said and "too large for this machine" in said
    assert "\x1b" not in said and "run a" in said


def test_bars_follow_the_stages_in_a_terminal_and_nothing_is_drawn_elsewhere() -> None:
    with export_progress(Console(file=io.StringIO()), quiet=False) as progress:
        assert progress is None
    shown = io.StringIO()
    with export_progress(Console(file=shown, force_terminal=True, width=120), quiet=False) as progress:
        assert progress is not None
        progress("Writing", 1_000_000, 4_000_000)
        progress("Verifying in fresh processes", 0, 0)
    for words in ("Writing", "1.00 MB / 4.00 MB", "Verifying in fresh processes"):
        assert words in shown.getvalue()


# -------------------------------------------------------------------- consumers


def test_every_consumer_reads_a_format_of_one_kind_and_every_format_has_one() -> None:
    for consumer in CONSUMERS.values():
        assert len({EXPORTERS[name].kind for name in consumer.formats if name in EXPORTERS}) <= 1, consumer.name
    read = {name for consumer in CONSUMERS.values() for name in consumer.formats}
    assert set(EXPORTERS) - read <= {"compact"}, "the compact form is the studio's own"


COMMANDS = {
    "transformers": "python 'my out/run.py' \"your question\"",
    "peft": "python 'my out/run.py' \"your question\"",
    "vllm": "vllm serve 'my out' --served-model-name pumps",
    "vllm-adapter": "vllm serve org/base --enable-lora --max-lora-rank 32 --lora-modules 'pumps=my out'",
    "sglang": "python -m sglang.launch_server --model-path 'my out' --served-model-name pumps",
    "sglang-adapter": "python -m sglang.launch_server --model-path org/base --enable-lora --max-lora-rank 24 "
    "--lora-paths 'pumps=my out'",
    "tgi": "docker run --gpus all --shm-size 1g -p 8080:80 -v \"$(realpath 'my out')\":/model "
    "ghcr.io/huggingface/text-generation-inference:3.3.4 --model-id /model",
    "llama.cpp": "llama-server -m 'my out/pumps-Q4_0.gguf' --jinja",
    "llama.cpp-adapter": "llama-server -m BASE.gguf --lora 'my out/pumps-Q4_0.gguf' --jinja",
    "ollama": "cd 'my out' && ollama create pumps -f Modelfile && ollama run pumps",
    "lm-studio": "mkdir -p ~/.lmstudio/models && cp -r 'my out/moe-studio' ~/.lmstudio/models/",
}


@pytest.mark.parametrize("name", list(CONSUMERS))
def test_each_consumer_has_its_one_command(name: str) -> None:
    place = Place("my out", "pumps", "org/base", 24, "pumps-Q4_0.gguf")
    assert CONSUMERS[name].command(place) == COMMANDS[name]


def test_an_adapters_script_is_told_of_a_base_that_is_not_on_the_hub(adapter: Path) -> None:
    assert studio.plan_export(request(adapter, "peft")).command.endswith(f" --base {EMBEDDED_DIR}")


def test_the_plan_knows_the_rank_and_the_base_of_an_adapter(adapter: Path) -> None:
    plan = studio.plan_export(request(adapter, "vllm-adapter"))
    assert "--max-lora-rank 32" in plan.command and str(EMBEDDED_DIR) in plan.command
    assert plan.as_json()["base"] == str(EMBEDDED_DIR) and plan.public_base == "embedded"
    assert f"--base {EMBEDDED_DIR}" in studio.plan_export(request(adapter, "peft")).command


def test_a_folder_of_a_hub_model_keeps_its_public_name(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED_DIR, tmp_path / "secret" / "base")
    sidecar = read_sidecar(adapter)
    assert sidecar
    for trained, public in (("org/base", "org/base"), (str(tmp_path / "secret" / "base"), "base")):
        write_sidecar(adapter, dataclasses.replace(sidecar, base_name=trained))
        plan = studio.plan_export(request(adapter, "peft", base=str(tmp_path / "secret" / "base")))
        assert plan.public_base == plan.source().public_base == public


def test_an_adapter_that_names_a_folder_that_is_elsewhere_asks_for_its_base(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "far-away", "r": 4}')
    with pytest.raises(AdapterFileError, match=r"no such directory.*with --base"):
        studio.plan_export(request(adapter))


def test_vllm_is_told_of_stacks_where_it_has_single_experts(adapter: Path) -> None:
    command = studio.plan_export(request(adapter, "vllm-adapter", format="vllm-3d")).command
    assert "--enable-mixed-moe-lora-format" in command and '"is_3d_lora_weight": true' in command
    assert "--enable-mixed" not in studio.plan_export(request(adapter, "vllm-adapter")).command


def test_vllm_gets_stacks_of_the_families_that_it_has_as_stacks(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studio.export_plan.Origin.model_type", "gpt_oss")
    plan = studio.plan_export(request(adapter, "vllm-adapter"))
    assert plan.format.name == "vllm-3d" and "--enable-mixed" not in plan.command
    with pytest.raises(ExportError, match="no per-expert adapters of gpt_oss models; give --format vllm-3d"):
        studio.plan_export(request(adapter, "vllm-adapter", format="per-expert"))


def test_no_certificate_no_export(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert studio.list_exports(tmp_path) == [] == studio.list_exports(tmp_path / "nowhere")
    with pytest.raises(StudioError, match="certificate"):
        studio.read_export(tmp_path / "a")


CERTIFIED = {
    "version": 1,
    "name": "a",
    "format": "safetensors",
    "consumer": "vllm",
    "verdict": "verified",
    "base": {"name": "org/base", "fingerprint": {}},
    "adapter": None,
    "held": None,
    "prompts": "",
    "options": {},
    "facts": {},
    "checks": [{"name": "weights", "status": "passed", "detail": "all", "measured": {}}],
    "files": {"config.json": {"bytes": 2, "sha256": ""}},
    "versions": {},
    "created": "2026-11-01T10:00:00+00:00",
}


def certified(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    (folder / "certificate.json").write_text(json.dumps({**CERTIFIED, **changes}))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"base": None},
        {"base": {"name": 5}},
        {"created": "yesterday"},
        {"created": None},
        {"consumer": []},
        {"name": None},
        {"verdict": {}},
        {"checks": [{"name": 1, "status": "passed", "detail": "", "measured": {}}]},
        {"facts": "none"},
        {"files": []},
        {"files": {"config.json": 2}},
    ],
)
def test_one_damaged_export_hides_no_other(tmp_path: Path, changes: dict[str, object]) -> None:
    certified(tmp_path / "a")
    certified(tmp_path / "b", **changes)
    (certified(tmp_path / "c") / "studio_adapter.json").write_text("[]")
    assert [Path(export["out"]).name for export in studio.list_exports(tmp_path)] == ["a"]
    with pytest.raises(StudioError):
        studio.read_export(tmp_path / "b")


def test_a_certificate_is_parsed_again_only_where_it_has_changed(tmp_path: Path) -> None:
    folder = certified(tmp_path / "a")
    assert studio.list_exports(tmp_path)[0]["prompts"] == ""
    before = exporting._listed.cache_info().misses
    assert studio.list_exports(tmp_path) and exporting._listed.cache_info().misses == before
    (folder / "certificate.json").write_text(json.dumps({**CERTIFIED, "prompts": "two texts"}))
    assert studio.list_exports(tmp_path)[0]["prompts"] == "two texts"
