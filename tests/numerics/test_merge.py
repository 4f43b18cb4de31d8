"""A merge on its way to the disk: killed and gone on with, refused before it begins, measured, small in memory."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.adapter_files import CONFIG, WEIGHTS, LinearFactors, read_adapter
from adapters.checkpoint import read_index
from adapters.errors import AdapterFileError, CheckpointError, ExportError, OutputExistsError
from adapters.fingerprint import file_sha256
from adapters.journal import JOURNAL
from adapters.loading import load_base
from adapters.lora import attach
from adapters.merge import merge_adapter
from adapters.merged import MergedWeights, _product
from adapters.merging import PIECE_VALUES, row_runs
from adapters.peft_files import save_adapter
from adapters.placement import Placement, same_experts_everywhere
from adapters.tensor_files import new_directory, read_tensor
from tests.numerics.conftest import EXPERTS, Tiny, randomise, save

PLACEMENT = Placement(attention=2, routed=same_experts_everywhere(4, 2, EXPERTS), alpha=6)
REPOSITORY = Path(__file__).parents[2]
KILLED_WHILE_MERGING = """
import os, signal, sys
from pathlib import Path
from adapters.merge import merge_adapter
base, adapter, out, stop = *map(Path, sys.argv[1:4]), int(sys.argv[4])
merge_adapter(base, adapter, out, progress=lambda done, total: done < stop or os.kill(os.getpid(), signal.SIGKILL))
"""


def adapted(directory: Path, adapter: Path, std: float = 0.2) -> Path:
    model = attach(load_base(directory, quantize="none"), PLACEMENT)
    randomise(model, std=std)
    save_adapter(model, PLACEMENT, adapter, base_name="base", base=directory)
    return adapter


@pytest.fixture
def sharded(tmp_path: Path) -> tuple[Path, Path]:
    """A base of several files, and an adapter for it."""
    base = tmp_path / "base"
    Tiny("qwen3_moe", 64, 32).build().save_pretrained(base, max_shard_size="100KB")
    assert len(list(base.glob("*.safetensors"))) > 3
    return base, adapted(base, tmp_path / "adapter")


def hashes(directory: Path) -> dict[str, str]:
    return {file.name: file_sha256(file) for file in sorted(directory.iterdir())}


def rewrite(file: Path, change: Any) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def set_config(adapter: Path, **options: Any) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, **options}))


def forget_base(adapter: Path) -> None:
    """As an adapter that others wrote."""
    (adapter / "studio_adapter.json").unlink()


# -------------------------------------------------------------------- killed


@pytest.mark.parametrize("share", [0.0, 0.3, 0.62, 0.99, 1.0])
def test_a_killed_merge_never_looks_finished_and_the_next_one_goes_on(
    sharded: tuple[Path, Path], tmp_path: Path, share: float
) -> None:
    base, adapter = sharded
    clean = merge_adapter(base, adapter, tmp_path / "clean")
    size = sum(info.size_bytes for info in read_index(base).values())
    paths = [str(path) for path in (base, adapter, tmp_path / "out")]
    command = [sys.executable, "-c", KILLED_WHILE_MERGING, *paths, str(int(size * share))]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run(command, env=environment, timeout=120).returncode == -9
    left = tmp_path / ".out.partial"
    assert not (tmp_path / "out").exists() and left.is_dir() and not (left / "config.json").exists()
    whole = len(list(left.glob("[!.]*.safetensors")))
    report = merge_adapter(base, adapter, tmp_path / "out")
    assert report.resumed == whole and (share < 0.3) == (whole == 0)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "clean") == dict(report.sha256)
    assert report.deltas == clean.deltas and not left.exists()


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone", "torn journal", "other adapter", "other dtype"])
def test_what_a_killed_merge_left_is_used_only_where_it_is_whole(
    sharded: tuple[Path, Path], tmp_path: Path, damage: str
) -> None:
    base, adapter = sharded

    def killed(done: int, total: int) -> None:
        if done == total:
            shutil.copytree(tmp_path / ".out.partial", tmp_path / "kept")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_adapter(base, adapter, tmp_path / "out", progress=killed)
    assert not (tmp_path / ".out.partial").exists()
    left = (tmp_path / "kept").rename(tmp_path / ".out.partial")
    files = sorted(left.glob("[!.]*.safetensors"))
    dtype = None
    if damage == "flipped":
        data = bytearray(files[0].read_bytes())
        data[-1] ^= 1
        files[0].write_bytes(data)
    elif damage == "truncated":
        files[0].write_bytes(files[0].read_bytes()[:-8])
    elif damage == "gone":
        files[0].unlink()
    elif damage == "torn journal":
        (left / JOURNAL).write_text((left / JOURNAL).read_text()[:-5])
    elif damage == "other adapter":
        rewrite(adapter / WEIGHTS, lambda tensors: next(iter(tensors.values())).add_(1))
    else:
        dtype = torch.bfloat16
    report = merge_adapter(base, adapter, tmp_path / "out", dtype=dtype)
    merge_adapter(base, adapter, tmp_path / "clean", dtype=dtype)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "clean")
    assert report.resumed == (0 if damage.startswith("other") else len(files) - 1)


def test_what_another_studio_wrote_is_not_kept(sharded: tuple[Path, Path], tmp_path: Path) -> None:
    """One that forgot the scale, killed after its first files: their bytes are whole, and wrong."""
    base, adapter = sharded
    shutil.copytree(REPOSITORY / "adapters", tmp_path / "faulty" / "adapters")
    module = tmp_path / "faulty" / "adapters" / "merged.py"
    right = module.read_text()
    module.write_text(right.replace(".mul_(factors.scale)", ""))
    assert module.read_text() != right
    size = sum(info.size_bytes for info in read_index(base).values())
    command = [sys.executable, "-c", KILLED_WHILE_MERGING, *map(str, (base, adapter, tmp_path / "out", size))]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "faulty")}
    assert subprocess.run(command, env=environment, cwd=tmp_path, timeout=120).returncode == -9
    assert merge_adapter(base, adapter, tmp_path / "out").resumed == 0
    merge_adapter(base, adapter, tmp_path / "clean")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "clean")


def test_a_full_disk_keeps_what_is_whole_for_the_next_merge(sharded: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = sharded

    def full(done: int, total: int) -> None:
        if done > total // 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        merge_adapter(base, adapter, tmp_path / "out", progress=full)
    assert not (tmp_path / "out").exists()
    assert merge_adapter(base, adapter, tmp_path / "out").resumed > 0
    assert not (tmp_path / ".out.partial").exists()
    with pytest.raises(OSError, match="No space"), new_directory(tmp_path / "other"):
        raise OSError(errno.ENOSPC, "No space left on device")  # what the next one would not use is not left
    assert not (tmp_path / ".other.partial").exists()


def test_two_processes_never_write_the_same_output(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out"):
        with pytest.raises(OutputExistsError, match="another process"), new_directory(tmp_path / "out"):
            pass
        assert (tmp_path / ".out.partial").is_dir()
    assert (tmp_path / "out").is_dir()


def test_an_old_output_comes_back_where_a_process_was_killed_between_two_renames(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("old")
    killed = """
import os, signal, sys
from pathlib import Path
from adapters import tensor_files
tensor_files._fsync = lambda path: path.name == ".out.partial" and os.kill(os.getpid(), signal.SIGKILL)
with tensor_files.new_directory(Path(sys.argv[1]), overwrite=True):
    pass
"""
    command = [sys.executable, "-c", killed, str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run(command, env=environment, timeout=120).returncode == -9
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputExistsError, match="--overwrite"), new_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "mine").read_text() == "old" and not (tmp_path / ".out.old").exists()


@pytest.mark.parametrize("there", [True, False], ids=["output there", "no output"])
def test_a_folder_of_the_users_with_the_name_of_an_old_output_is_left_alone(tmp_path: Path, there: bool) -> None:
    mine = tmp_path / ".out.old" / "mine"
    mine.mkdir(parents=True)
    if there:
        (tmp_path / "out").mkdir()
    with (
        pytest.raises(OutputExistsError, match=r"\.out\.old is in the way"),
        new_directory(tmp_path / "out", overwrite=True),
    ):
        raise AssertionError("work was spent")
    assert mine.is_dir() and (tmp_path / "out").exists() == there and not (tmp_path / ".out.partial").exists()


def test_what_a_killed_process_left_is_cleared_away_unless_it_is_asked_for(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "half").write_text("")
    with new_directory(tmp_path / "out", resume=True) as directory:
        assert (directory / "half").exists()
    shutil.rmtree(tmp_path / "out")
    left.mkdir()
    (left / "half").write_text("")
    with new_directory(tmp_path / "out") as directory:
        assert not list(directory.iterdir())


# -------------------------------------------------------------------- refused before it begins


def refused(base: Path, adapter: Path, error: type[Exception], words: str, **options: Any) -> None:
    out = base.parent / "out"
    with pytest.raises(error, match=words):
        merge_adapter(base, adapter, out, **options)
    assert not out.exists() and not list(out.parent.glob(".out*"))


def test_a_base_changed_since_training_is_refused_and_another_tokenizer_is_told(
    sharded: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = sharded
    (base / "tokenizer.json").write_text("{}")
    assert "tokenizer has changed" in merge_adapter(base, adapter, tmp_path / "fine").warnings[0]
    rewrite(next(base.glob("*.safetensors")), lambda tensors: [tensor.add_(1) for tensor in tensors.values()])
    refused(base, adapter, AdapterFileError, "differs from it in its weights")


def test_a_lost_layer_of_the_adapter_is_refused_by_name(sharded: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = sharded
    lost = "base_model.model.model.layers.2.self_attn.k_proj.lora_{}.weight"
    rewrite(adapter / WEIGHTS, lambda tensors: [tensors.pop(lost.format(side)) for side in "AB"])
    refused(base, adapter, AdapterFileError, r"layers\.2\.self_attn\.k_proj\.weight is targeted")
    set_config(adapter, layers_to_transform=[0, 1, 3])  # only these were meant, and the others are strangers
    assert not [key for key in MergedWeights(base, adapter).changed if "layers.2.self_attn.k_proj" in key]


def test_a_lost_stack_of_the_adapter_is_refused_by_name(sharded: tuple[Path, Path]) -> None:
    base, adapter = sharded
    lost = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_{}.weight"
    rewrite(adapter / WEIGHTS, lambda tensors: [tensors.pop(lost.format(side)) for side in "AB"])
    refused(base, adapter, AdapterFileError, r"layers\.1\.mlp\.experts\.gate_up_proj is targeted")


@pytest.mark.parametrize("lost", ["q_proj", "experts", "experts.base_layer"])
def test_a_kind_lost_in_all_layers_is_refused_by_name(sharded: tuple[Path, Path], lost: str) -> None:
    """Nothing of its kind is left in the file to say that other layers have it."""
    base, adapter = sharded

    def lose(tensors: dict[str, torch.Tensor]) -> None:
        names = [name for name in tensors if re.fullmatch(rf".*\.{lost}\.lora_[AB]\.weight", name)]
        assert names
        for name in names:
            tensors.pop(name)

    rewrite(adapter / WEIGHTS, lose)
    tensor = {"experts": "down_proj", "experts.base_layer": "gate_up_proj"}.get(lost, "q_proj.weight")
    refused(base, adapter, AdapterFileError, rf"{re.escape(tensor)} is targeted")


def test_target_modules_given_as_a_pattern_names_linear_layers_alone(sharded: tuple[Path, Path]) -> None:
    base, adapter = sharded
    set_config(adapter, target_modules=r".*\.(self_attn|experts)\..*_proj")
    assert MergedWeights(base, adapter).changed
    set_config(adapter, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "experts.down_proj", "absent"])
    assert MergedWeights(base, adapter).changed


@pytest.mark.parametrize("side", ["A", "B"])
def test_half_a_pair_and_strangers_are_refused(sharded: tuple[Path, Path], side: str) -> None:
    base, adapter = sharded
    name = f"base_model.model.model.layers.2.self_attn.k_proj.lora_{side}.weight"
    rewrite(adapter / WEIGHTS, lambda tensors: tensors.pop(name))
    refused(base, adapter, AdapterFileError, "k_proj.lora_. has no|k_proj.lora_[AB].weight has no")
    rewrite(adapter / WEIGHTS, lambda tensors: tensors.update({"base_model.model.stranger": torch.ones(2)}))
    refused(base, adapter, AdapterFileError, "stranger is not a LoRA factor")


def test_an_expert_that_the_base_lost_is_refused(sharded: tuple[Path, Path]) -> None:
    base, adapter = sharded
    forget_base(adapter)
    lost, info = next((key, info) for key, info in read_index(base).items() if "experts.3.up_proj" in key)
    rewrite(info.file, lambda tensors: tensors.pop(lost))
    refused(base, adapter, CheckpointError, f"{lost} is missing")


def test_links_out_of_the_folder_are_refused_and_the_hubs_cache_is_not(
    sharded: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = sharded
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1f2e"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in base.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert merge_adapter(snapshot, adapter, tmp_path / "fine").changed
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(base / "config.json", tmp_path / "elsewhere")
    (base / "config.json").symlink_to(moved)
    refused(base, adapter, CheckpointError, "config.json is a link to .*elsewhere")
    moved = shutil.move(adapter / WEIGHTS, tmp_path / "elsewhere")
    (adapter / WEIGHTS).symlink_to(moved)
    refused(snapshot, adapter, AdapterFileError, f"{WEIGHTS} is a link")


def test_pickles_are_refused(sharded: tuple[Path, Path]) -> None:
    base, adapter = sharded
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    refused(base, adapter, AdapterFileError, "pickle adapters .* are refused")


def test_too_small_a_disk_is_told_before_the_first_byte(
    sharded: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = sharded
    written: list[int] = []
    usage = shutil.disk_usage(base)._replace(free=1000)
    monkeypatch.setattr("adapters.merge.shutil.disk_usage", lambda path: usage)
    progress = lambda done, total: written.append(done)  # noqa: E731
    refused(base, adapter, ExportError, "has 0.00 GB free", progress=progress)
    assert not written


def test_what_float16_cannot_hold_is_refused(sharded: tuple[Path, Path]) -> None:
    base, adapter = sharded
    forget_base(adapter)
    rewrite(next(base.glob("*.safetensors")), lambda tensors: [t.view(-1)[:1].fill_(7e4) for t in tensors.values()])
    refused(base, adapter, CheckpointError, "float16 .* no more than 65504: write bfloat16", dtype=torch.float16)
    assert merge_adapter(base, adapter, base.parent / "out", dtype=torch.bfloat16).dtype == "bfloat16"


# -------------------------------------------------------------------- adapters of an old PEFT


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4_text", "gpt_oss"])
@pytest.mark.parametrize("shape", [(64, 32), (64, 64)], ids=["square gate_up", "square down"])
def test_the_sides_of_an_old_pefts_stacks_are_read_where_sizes_prove_them(
    family: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    tiny = Tiny(family, *shape)
    base = save(tiny, tmp_path)
    adapter = adapted(base, tmp_path / "adapter")
    want = expert_deltas(base, adapter)
    set_config(adapter, peft_version="0.18.1")
    assert all(torch.equal(delta, want[name]) for name, delta in expert_deltas(base, adapter).items())
    rewrite(adapter / WEIGHTS, other_side)
    for name, delta in expert_deltas(base, adapter).items():
        torch.testing.assert_close(delta, want[name], rtol=0, atol=1e-6)
    with pytest.raises(AdapterFileError, match=r"0\.18\.1, and before 0\.19\.1"):
        read_adapter(adapter, tiny.layout)  # no sizes to prove it


def expert_deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    found = MergedWeights(base, adapter).adapter
    assert found is not None and len(found.experts) == 4
    return {name: factors.delta(2) for name, factors in found.experts.items()}


def other_side(tensors: dict[str, torch.Tensor]) -> None:
    """The same stacks with lora_A on the other side, as 0.17 to 0.19.0 wrote them for families without a swap."""
    for name in [name for name in tensors if ".experts." in name and ".lora_A." in name]:
        partner = name.replace("lora_A", "lora_B")
        a = tensors[name].reshape(EXPERTS, 4, -1)
        b = tensors[partner].reshape(len(tensors[partner]), 4, EXPERTS).permute(2, 1, 0)
        tensors[name], tensors[partner] = b.flatten(0, 1).contiguous(), a.permute(2, 1, 0).flatten(1).contiguous()


@pytest.mark.parametrize("version", ["0.19.0", None])
def test_an_old_pefts_stacks_are_refused_where_all_are_square(version: str | None, tmp_path: Path) -> None:
    tiny = Tiny("qwen3_moe", 64, 64)
    base = save(tiny, tmp_path)
    adapter = adapted(base, tmp_path / "adapter")

    def only_down(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts.base_layer." in name]:
            tensors.pop(name)

    rewrite(adapter / WEIGHTS, only_down)
    names = ["mlp.experts.down_proj"]
    set_config(adapter, peft_version=version, target_parameters=names)
    refused(base, adapter, AdapterFileError, "the sizes do not tell on which")
    set_config(adapter, peft_version="0.19.1")
    assert merge_adapter(base, adapter, tmp_path / "out").experts_changed == 2 * EXPERTS


# -------------------------------------------------------------------- what is measured and written


def test_the_report_measures_every_delta_and_warns_where_rounding_eats_it(tmp_path: Path) -> None:
    base = save(Tiny("llama4_text", 64, 32, 1), tmp_path)
    adapter = adapted(base, tmp_path / "adapter", std=0.004)
    exact = merge_adapter(base, adapter, tmp_path / "exact")
    rounded = merge_adapter(base, adapter, tmp_path / "rounded", dtype=torch.bfloat16)
    merged = MergedWeights(base, adapter)
    assert {delta.key for delta in exact.deltas} == merged.changed and not exact.warnings
    after = read_index(tmp_path / "rounded")
    for delta in rounded.deltas:
        weight, change = read_tensor(merged.index[delta.key]).double(), merged.delta(delta.key)
        assert change is not None
        assert delta.relative == pytest.approx(float(change.double().norm() / weight.norm()), rel=1e-5)
        lost = read_tensor(after[delta.key]).double() - merged.read(delta.key).double()
        assert delta.lost == pytest.approx(float(lost.norm() / change.double().norm()), rel=1e-3)
    assert max(delta.lost for delta in rounded.deltas) > 0.5
    assert "rounding to bfloat16" in rounded.warnings[0] and "--dtype float32" in rounded.warnings[0]


def test_files_are_readable_by_others_and_dtypes_are_as_asked_for(sharded: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = sharded
    key, info = next(iter(read_index(base).items()))
    rewrite(info.file, lambda tensors: tensors.update({"model.counter": torch.arange(3)}))
    index_file = base / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"]["model.counter"] = info.file.name
    index_file.write_text(json.dumps(index))
    forget_base(adapter)
    (base / "config.json").chmod(0o600)
    report = merge_adapter(base, adapter, tmp_path / "out", dtype=torch.float16)
    after = read_index(tmp_path / "out")
    assert {name: i.dtype for name, i in after.items() if i.dtype != "F16"} == {"model.counter": "I64"}
    assert after[key].shape == info.shape and report.files == len({i.file for i in after.values()}) > 1
    assert {k: i.file.name for k, i in after.items()} == {k: i.file.name for k, i in read_index(base).items()}
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o644}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    model = Tiny("qwen3_moe", 64, 32).model_class.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16


def test_reading_rows_and_whole_tensors_gives_the_same_values(sharded: tuple[Path, Path]) -> None:
    merged = MergedWeights(*sharded)
    for key in merged.changed:
        whole = merged.read(key)
        parts = [merged.read(key, rows=(row, min(row + 7, len(whole)))) for row in range(0, len(whole), 7)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1000, 1500), (4097, 256), (63, 9), (64, 30_000), (191, 20_000), (1, 5)])
@pytest.mark.parametrize("rank", [3, 16])
def test_the_pieces_of_a_product_have_the_bits_of_the_whole(shape: tuple[int, int], rank: int) -> None:
    factors = LinearFactors(torch.randn(rank, shape[1]), torch.randn(shape[0], rank), 0.7)
    runs = list(row_runs(*shape))
    assert [first for first, _ in runs[1:]] == [last for _, last in runs[:-1]] and runs[-1][1] == shape[0]
    assert len(runs) > 1 or shape[0] * shape[1] < 2 * PIECE_VALUES
    transposed = LinearFactors(factors.B.t(), factors.A.t(), 0.7)
    for parts in ([_product(factors, run) for run in runs], [_product(transposed, run, True) for run in runs]):
        assert torch.equal(torch.cat(parts), factors.delta())


PEAK = """
import sys
from pathlib import Path
from adapters.merge import merge_adapter
merge_adapter(*map(Path, sys.argv[1:4]))
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")][0])
"""


def test_the_peak_does_not_depend_on_the_size_of_stack_or_model(tmp_path: Path) -> None:
    """One stack of 0.35 GB in a file: whole in float32 it would be twice that."""
    sys.path.insert(0, str(REPOSITORY))
    from benchmarks.loading import write_checkpoint
    from benchmarks.merge import write_adapter

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    size = write_checkpoint(base, "stacked", layers=1)
    write_adapter(base, adapter)
    command = [sys.executable, "-c", PEAK, *map(str, (base, adapter, tmp_path / "out"))]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    index = read_index(base)
    slices = [info.size_bytes // info.shape[0] for info in index.values() if len(info.shape) == 3]
    assert size > 3e8 and int(done.stdout) * 1024 < 0.5e9 + 3 * max(slices)
