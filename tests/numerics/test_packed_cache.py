"""The packed cache: the next load is bit-equal and reads no weights, and only a whole and fitting entry is used."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from safetensors.torch import load_file, save_file

from adapters import loading, packed_cache
from adapters.loading import load_base
from adapters.packed_cache import MANIFEST, WEIGHTS, cache_entries, default_cache_dir, remove
from tests.numerics.conftest import Tiny, save

QWEN = Tiny("qwen3_moe", 64, 32, 2)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(QWEN, tmp_path)


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry whenever a model is filled from its checkpoint."""
    calls: list[int] = []
    original = loading.fill

    def counting(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(loading, "fill", counting)
    return calls


def held(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of a model, those of 4-bit linears too."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            found[f"{name}.absmax"] = state.absmax
            if state.nested:
                found |= {f"{name}.scale": state.state2.absmax, f"{name}.offset": state.offset}
    return found


def assert_equal(one: torch.nn.Module, other: torch.nn.Module) -> None:
    first, second = held(one), held(other)
    assert first.keys() == second.keys()
    assert any("written" in name for name in first) == any("written" in name for name in second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"quantize": "fp4", "double_quant": False},
        {"quantize": "int8", "dtype": torch.bfloat16},
        {"quantize": "nf4", "int8_experts": (1, 4)},
        {"quantize": "none", "dtype": torch.bfloat16},
    ],
    ids=str,
)
@pytest.mark.parametrize("tiny", [QWEN, Tiny("llama4_text", 64, 32, 1)], ids=str)
def test_the_second_load_is_bit_equal_and_fills_nothing(
    tiny: Tiny, tmp_path: Path, filled: list[int], settings: dict, ids: torch.Tensor
) -> None:
    base, seen = save(tiny, tmp_path), []
    plain = load_base(base, **settings)
    first = load_base(base, cache=tmp_path / "cache", **settings)
    assert len(filled) == 2
    second = load_base(base, cache=tmp_path / "cache", progress=lambda *count: seen.append(count), **settings)
    assert len(filled) == 2
    assert_equal(plain, first)
    assert_equal(first, second)
    assert seen[-1][0] == seen[-1][1] > 0
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, second(ids).logits)
    (entry,) = cache_entries(tmp_path / "cache")
    assert entry.source == str(base) and entry.size_bytes > 1000


def flip_bit(entry: Path, place: int) -> None:
    data = bytearray((entry / WEIGHTS).read_bytes())
    data[place] ^= 16
    (entry / WEIGHTS).write_bytes(data)


def edit_manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(entry: Path) -> None:
        manifest = json.loads((entry / MANIFEST).read_text())
        change(manifest)
        (entry / MANIFEST).write_text(json.dumps(manifest))

    return edit


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit in the last tensor": lambda entry: flip_bit(entry, -1),
    "a bit in the middle": lambda entry: flip_bit(entry, (entry / WEIGHTS).stat().st_size // 2),
    "a bit in the header": lambda entry: flip_bit(entry, 60),
    "truncated": lambda entry: os.truncate(entry / WEIGHTS, (entry / WEIGHTS).stat().st_size - 7),
    "cut off in its header": lambda entry: os.truncate(entry / WEIGHTS, 100),
    "empty": lambda entry: os.truncate(entry / WEIGHTS, 0),
    "no weights": lambda entry: (entry / WEIGHTS).unlink(),
    "no manifest": lambda entry: (entry / MANIFEST).unlink(),
    "half a manifest": lambda entry: os.truncate(entry / MANIFEST, 300),
    "another shape": lambda entry: (entry / WEIGHTS).write_bytes(
        (entry / WEIGHTS).read_bytes().replace(b'"shape": [96, 64]', b'"shape": [64, 96]')
    ),
    "no hashes": edit_manifest(lambda manifest: manifest["hashes"].clear()),
    "hashes cut short": edit_manifest(lambda manifest: manifest["hashes"].update({"model.norm.weight": []})),
    "other settings": edit_manifest(lambda manifest: manifest["settings"].update(double_quant=False)),
    "another version": edit_manifest(lambda manifest: manifest["settings"].update(bitsandbytes="0.1")),
    "another source": edit_manifest(lambda manifest: manifest.update(source="/elsewhere")),
    "nonsense": edit_manifest(lambda manifest: manifest.update(sources=[3])),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_whole_is_built_anew_and_not_used(
    base: Path, tmp_path: Path, filled: list[int], damage: str
) -> None:
    cache = tmp_path / "cache"
    first = load_base(base, cache=cache)
    (entry,) = cache_entries(cache)
    DAMAGE[damage](entry.path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = load_base(base, cache=cache)
    assert len(filled) == 2
    assert_equal(first, again)
    if damage not in ("no manifest", "half a manifest"):
        assert any("is not used and built anew" in str(warning.message) for warning in said)
    third = load_base(base, cache=cache)
    assert len(filled) == 2  # what was built anew serves
    assert_equal(first, third)
    assert [path.name for path in cache.iterdir()] == [entry.path.name]  # nothing left behind


def change_a_weight(base: Path, keep_times: bool = False) -> None:
    file = base / "model.safetensors"
    times, tensors = file.stat(), load_file(file)
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][3, 5] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    if keep_times:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_changed_checkpoint_is_loaded_anew(base: Path, tmp_path: Path, filled: list[int], keep_times: bool) -> None:
    load_base(base, cache=tmp_path / "cache")
    change_a_weight(base, keep_times)
    with pytest.warns(UserWarning, match="the checkpoint has changed"):
        again = load_base(base, cache=tmp_path / "cache")
    assert len(filled) == 2
    assert_equal(again, load_base(base))
    load_base(base, cache=tmp_path / "cache")
    assert len(filled) == 3  # of which the one without a cache


def test_a_touched_checkpoint_is_hashed_once_and_the_entry_serves(
    base: Path, tmp_path: Path, filled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, hashed = tmp_path / "cache", []
    load_base(base, cache=cache)
    original = packed_cache._sha256
    monkeypatch.setattr(packed_cache, "_sha256", lambda file, stop: hashed.append(file) or original(file, stop))
    touch(base)
    load_base(base, cache=cache)
    assert len(filled) == 1 and len(hashed) == 1
    load_base(base, cache=cache)
    assert len(filled) == 1 and len(hashed) == 1


def touch(base: Path) -> None:
    """Another inode, other times, the same bytes."""
    shutil.copy(base / "model.safetensors", base / "copy")
    (base / "copy").rename(base / "model.safetensors")


def test_a_damaged_entry_of_a_touched_checkpoint_is_replaced(base: Path, tmp_path: Path, filled: list[int]) -> None:
    cache = tmp_path / "cache"
    load_base(base, cache=cache)
    touch(base)
    flip_bit(cache_entries(cache)[0].path, -1)
    with pytest.warns(UserWarning, match="its bytes are not those that were written"):
        load_base(base, cache=cache)
    load_base(base, cache=cache)
    assert len(filled) == 2


def test_an_entry_that_vanishes_while_it_is_looked_at_is_built_anew(
    base: Path, tmp_path: Path, filled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, original = tmp_path / "cache", packed_cache._stat
    load_base(base, cache=cache)
    (entry,) = cache_entries(cache)

    def vanishing(file: Path) -> dict[str, int]:
        if file.name == MANIFEST:
            remove(entry)
        return original(file)

    monkeypatch.setattr(packed_cache, "_stat", vanishing)
    load_base(base, cache=cache)
    assert len(filled) == 2 and len(cache_entries(cache)) == 1


def test_leftovers_that_vanish_do_not_keep_an_entry_from_being_written(base: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    load_base(base, cache=cache)
    (entry,) = cache_entries(cache)
    remove(entry)
    (cache / f".{entry.name}.gone").symlink_to("nowhere")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_base(base, cache=cache)
    assert cache_entries(cache)[0].name == entry.name


def test_what_is_only_being_written_is_no_entry(base: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    load_base(base, cache=cache)
    (entry,) = cache_entries(cache)
    shutil.copytree(entry.path, cache / f".{entry.name}.staged")
    assert [found.name for found in cache_entries(cache)] == [entry.name]


def test_an_entry_of_a_hub_model_bears_its_name(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen3-30B" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    save(QWEN, tmp_path).rename(snapshot)
    load_base(snapshot, cache=tmp_path / "cache")
    (entry,) = cache_entries(tmp_path / "cache")
    assert re.fullmatch(r"Qwen3-30B-[0-9a-f]{16}", entry.name)


def test_settings_have_entries_of_their_own(base: Path, tmp_path: Path, filled: list[int]) -> None:
    cache = tmp_path / "cache"
    for _ in range(2):
        load_base(base, cache=cache)
        load_base(base, cache=cache, quantize="int8")
        load_base(base, cache=cache, int8_experts=[2])
    assert len(filled) == 3 and len(cache_entries(cache)) == 3
    remove(cache_entries(cache)[0])
    assert len(cache_entries(cache)) == 2 == len(list(cache.iterdir()))


def test_a_full_disk_is_said_and_the_load_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: torch.Tensor
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(packed_cache.shutil, "disk_usage", lambda _: usage)
    with pytest.warns(UserWarning, match=r"is not kept in .*: it takes 0.0 GB, and 0.0 GB are free"):
        model = load_base(base, cache=tmp_path / "cache")
    assert_equal(model, load_base(base))
    assert cache_entries(tmp_path / "cache") == []


def test_a_disk_that_fills_up_while_writing_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_cache, "_write_manifest", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        load_base(base, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("change", [os.utime, os.unlink])
def test_a_checkpoint_that_changes_while_it_is_read_is_not_kept(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    original = loading.fill

    def changing(*args, **kwargs):
        problems = original(*args, **kwargs)
        change(base / "model.safetensors")
        return problems

    monkeypatch.setattr(loading, "fill", changing)
    with pytest.warns(UserWarning, match="the checkpoint changed while it was read"):
        load_base(base, cache=tmp_path / "cache")
    assert cache_entries(tmp_path / "cache") == []


def test_a_bad_checkpoint_leaves_no_entry(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(loading.CheckpointError, match="NaN"):
        load_base(base, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_bad_checkpoint_is_reported_before_all_of_it_is_hashed(tmp_path: Path) -> None:
    large = tmp_path / "model.safetensors"
    large.touch()
    os.truncate(large, 40 * 2**30)  # a hole: nothing on the disk, most of a minute of sha256
    begun = time.perf_counter()
    with pytest.raises(loading.CheckpointError), packed_cache.Entry(tmp_path, tmp_path, [large], {}).building():
        raise loading.CheckpointError(tmp_path, ["bad"])
    assert time.perf_counter() - begun < 10


def test_hashing_leaves_the_cores_to_the_quantiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, threads = [tmp_path / str(i) for i in range(12)], set()
    for file in files:
        file.touch()

    def slow(file: Path, stop: threading.Event) -> str:
        threads.add(threading.get_ident())
        time.sleep(0.01)
        return ""

    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(packed_cache, "_sha256", slow)
    with packed_cache.Entry(tmp_path, tmp_path, files, {}).building():
        pass
    assert 1 <= len(threads) <= 2


def test_an_entry_that_appears_meanwhile_stays(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, original = tmp_path / "cache", loading.fill

    def overtaken(*args, **kwargs):
        monkeypatch.setattr(loading, "fill", original)
        load_base(base, cache=cache)
        written.append((cache_entries(cache)[0].path / MANIFEST).stat().st_ino)
        return original(*args, **kwargs)

    written: list[int] = []
    monkeypatch.setattr(loading, "fill", overtaken)
    load_base(base, cache=cache)
    assert [(entry.path / MANIFEST).stat().st_ino for entry in cache_entries(cache)] == written
    assert len(list(cache.iterdir())) == 1


def test_two_processes_at_once_leave_one_whole_entry(base: Path, tmp_path: Path, filled: list[int]) -> None:
    cache = tmp_path / "cache"
    code = (
        "import sys; from pathlib import Path; from adapters.loading import load_base; print('ready', flush=True); "
        "sys.stdin.readline(); [load_base(Path(sys.argv[1]), cache=Path(sys.argv[2])) for _ in range(4)]"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", code, str(base), str(cache)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as other:
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = [load_base(base, cache=cache) for _ in range(4)]
        _, said = other.communicate(timeout=60)
        assert other.returncode == 0, said
    assert len(cache_entries(cache)) == 1 == len(list(cache.iterdir()))
    assert len(filled) <= 1
    for model in ours:
        assert_equal(model, load_base(base))


def test_the_default_place_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/moe-studio/packed")
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert default_cache_dir() == Path.cwd() / "here/moe-studio/packed"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ann")
    assert default_cache_dir() == Path("/home/ann/.cache/moe-studio/packed")
