"""Quantised models kept for the next load, which then neither reads nor quantises the checkpoint again.

    <cache>/<model>-<16 hex digits>/
        model.safetensors     every tensor of the model as held
        manifest.json         what it was made from and how, and a hash of each piece of each tensor

The digits stand for the checkpoint's directory, the settings and the versions: other settings are another entry. An
entry is used only when its source files are those it was made from (size, times and inode, or else their sha256), and
when every piece read has the hash that was written; anything else is built anew. It appears under its name by one
rename.

No torch at import: `default_cache_dir`, `cache_entries` and `remove` serve the command line (`studio cache`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.checkpoint import read_header
from adapters.errors import StudioError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
WEIGHTS, MANIFEST = "model.safetensors", "manifest.json"
PIECE_BYTES = 16 * 2**20
"""What is read and hashed at a time: xxh3 of 128 bits, 30 GB/s on a core where sha256 makes 0.8."""

HASHING_THREADS = 2
"""For the sha256 of the checkpoint's files: the other cores quantise meanwhile."""

ABANDONED_SECONDS = 86_400

SPARE_BYTES = 256 * 2**20
"""Left free on the disk."""


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/moe-studio/packed`, or the same under `~/.cache`; absolute."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root.absolute() / "moe-studio" / "packed"


@dataclass(frozen=True)
class CacheEntry:
    """One kept model: where, of which checkpoint, in which settings, how large, since when (seconds of the epoch)."""

    path: Path
    source: str
    settings: dict[str, Any]
    size_bytes: int
    built_at: float

    @property
    def name(self) -> str:
        return self.path.name


def cache_entries(cache: Path) -> list[CacheEntry]:
    """What `cache` holds, in the order of names; what is no entry, or is only being written, is left out."""
    found = []
    for path in sorted(manifest.parent for manifest in cache.glob("[!.]*/" + MANIFEST)):
        manifest = _manifest(path)
        with suppress(OSError):  # another process is removing it
            files = [file.stat() for file in path.iterdir()]
            built = min(file.st_mtime for file in files)  # the weights: a manifest may be refreshed later
            size = sum(file.st_size for file in files)
            if manifest is not None:
                found.append(CacheEntry(path, manifest["source"], manifest["settings"], size, built))
    return found


def remove(entry: CacheEntry) -> None:
    """Deletes one entry. A load that has begun to read it builds the model from its checkpoint instead."""
    _discard(entry.path)


class Entry:
    """The place of one model, in one set of settings, in a cache.

    Args:
        cache: the directory of all entries; made when needed.
        directory: of the checkpoint.
        files: the checkpoint's weights.
        settings: everything else that the bytes depend on, as JSON values.
    """

    def __init__(self, cache: Path, directory: Path, files: Sequence[Path], settings: Mapping[str, Any]):
        self.source, self.files = str(directory.resolve()), files
        self.settings = {**settings, "format": FORMAT_VERSION} | {
            package: version(package) for package in ("bitsandbytes", "transformers")
        }
        key = json.dumps([self.source, self.settings], sort_keys=True)
        self.path = cache / f"{_model_name(directory.resolve())}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self._sources: dict[str, Any] | None = None
        self._seen: dict[str, int] | None = None

    def load(self, tensors: Mapping[str, Tensor], progress: Callable[[int, int], None] | None = None) -> bool:
        """Fills `tensors` from the entry; False when there is none to use, and then they may hold anything.

        Args:
            progress: called with (bytes read, bytes in all).
        """
        self._seen = self._state()
        manifest = _manifest(self.path)
        if manifest is None:
            return False
        try:
            problem = self._unfit(manifest) or self._read(manifest, tensors, progress)
        except (OSError, StudioError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            warnings.warn(f"the packed model {self.path} is not used and built anew: {problem}", stacklevel=2)
        return not problem

    def _state(self) -> dict[str, int] | None:
        """Tells one entry in this place from another that replaced it; None for none."""
        try:
            return _stat(self.path / MANIFEST)
        except OSError:
            return None

    def _unfit(self, manifest: dict[str, Any]) -> str | None:
        """Why the manifest is not of this checkpoint in these settings. Refreshes times that alone have changed."""
        if manifest["settings"] != self.settings or manifest["source"] != self.source:
            return "it was made in other settings or by other versions"
        held, now = manifest["sources"], {file.name: _stat(file) for file in self.files}
        if held.keys() != now.keys():
            return "the checkpoint has other files"
        changed = [file for file in self.files if {**now[file.name], "sha256": ""} != {**held[file.name], "sha256": ""}]
        if any(held[file.name]["size"] != now[file.name]["size"] for file in changed):
            return "the checkpoint has changed"
        if not changed:
            return None
        for file, digest in _sha256_each(changed).items():
            if digest != held[file.name]["sha256"]:
                return "the checkpoint has changed"
            held[file.name] = {**now[file.name], "sha256": digest}
        _write_manifest(self.path, manifest)
        self._seen = self._state()  # still the entry that was found
        return None

    def _read(
        self, manifest: dict[str, Any], tensors: Mapping[str, Tensor], progress: Callable[[int, int], None] | None
    ) -> str | None:
        from adapters.tensor_files import NAMES, OpenFiles, thread_pool

        held, hashes = read_header(self.path / WEIGHTS)[0], manifest["hashes"]
        shapes = {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
        if {name: (info.dtype, info.shape) for name, info in held.items()} != shapes or held.keys() != hashes.keys():
            return "it holds other tensors"
        done, total = 0, sum(info.size_bytes for info in held.values())
        with OpenFiles() as files, thread_pool() as pool:

            def verify(piece: tuple[str, int]) -> int:
                name, number = piece
                info, part = held[name], _piece(tensors[name], number)
                buffer = part if part.is_cpu else part.cpu()
                files.read(info.file, info.start + number * PIECE_BYTES, buffer)
                if part is not buffer:
                    part.copy_(buffer)
                return buffer.nbytes if _hash(buffer) == hashes[name][number] else -1

            pieces = [(name, i) for name, tensor in tensors.items() for i in range(_piece_count(tensor))]
            if {name: _piece_count(tensors[name]) for name in hashes} != {n: len(found) for n, found in hashes.items()}:
                return "its hashes are not complete"
            for size in pool.map(verify, pieces):
                if size < 0:
                    return "its bytes are not those that were written"
                done += size
                if progress:
                    progress(done, total)
        return None

    @contextmanager
    def building(self) -> Iterator[None]:
        """Hashes the source files while the block reads them; what changes meanwhile is not stored.

        An exception that leaves the block ends the hashing at once.
        """
        before, stop = {file.name: _stat(file) for file in self.files}, threading.Event()
        with ThreadPoolExecutor(1) as pool:
            digests = pool.submit(_sha256_each, self.files, stop)
            try:
                yield
            except BaseException:
                stop.set()
                raise
            with suppress(OSError):  # the model is loaded, whatever has become of its files
                found = digests.result()
                if before == {file.name: _stat(file) for file in self.files}:
                    self._sources = {file.name: {**before[file.name], "sha256": found[file]} for file in self.files}

    def store(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes the entry. Where that fails, a warning says so, and nothing else happens."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        try:
            if self._sources is None:
                raise OSError("the checkpoint changed while it was read")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path.parent).free
            if free < size + SPARE_BYTES:
                raise OSError(f"it takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on that disk")
            self._write(tensors)
        except OSError as error:
            warnings.warn(f"the packed model is not kept in {self.path.parent}: {error}", stacklevel=2)

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        from adapters.tensor_files import write_tensors

        hashes: dict[str, list[str]] = {}

        def produce(name: str) -> Tensor:
            tensor = tensors[name].cpu()
            hashes[name] = [_hash(_piece(tensor, number)) for number in range(_piece_count(tensor))]
            return tensor

        for left in self.path.parent.glob(f".{self.path.name}.*"):  # by a process that was killed
            with suppress(OSError):  # or by one that has just ended
                if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
        try:
            specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            write_tensors(staged / WEIGHTS, specs, produce)
            manifest = {"source": self.source, "settings": self.settings, "sources": self._sources, "hashes": hashes}
            _write_manifest(staged, manifest)
            self._take_place(staged)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _take_place(self, staged: Path) -> None:
        """Renames the staged entry into place, unless another process has put one there since `load`."""
        try:
            staged.rename(self.path)
        except OSError:
            if self._state() != self._seen:
                return
            _discard(self.path)
            staged.rename(self.path)


def _discard(path: Path) -> None:
    """Deletes a directory that others may be reading or discarding too: out of the way first."""
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent)) if path.exists() else None
    if aside is not None:
        with suppress(FileNotFoundError):  # another process was faster
            path.rename(aside / "entry")
        shutil.rmtree(aside, ignore_errors=True)


def _manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of an entry; None where there is none that can be read."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    keys = {"source", "settings", "sources", "hashes"}
    return manifest if isinstance(manifest, dict) and keys <= manifest.keys() else None


def _model_name(directory: Path) -> str:
    """The directory's name; the model's where it is a snapshot in the hub's cache, models--org--name/snapshots/hash."""
    hub = directory.parent.parent.name
    return hub.rpartition("--")[2] if hub.startswith("models--") else directory.name


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{MANIFEST}.", dir=directory)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(manifest, file)
        file.flush()
        os.fsync(file.fileno())
    Path(name).rename(directory / MANIFEST)


def _stat(file: Path) -> dict[str, int]:
    found = file.stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns, "inode": found.st_ino}


def _sha256_each(files: Sequence[Path], stop: threading.Event | None = None) -> dict[Path, str]:
    stop = stop or threading.Event()
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return dict(zip(files, pool.map(lambda file: _sha256(file, stop), files), strict=True))


def _sha256(file: Path, stop: threading.Event) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with file.open("rb", buffering=0) as opened:
        while size := opened.readinto(block):
            if stop.is_set():
                raise CancelledError
            digest.update(block[:size])
    return digest.hexdigest()


def _piece_count(tensor: Tensor) -> int:
    return -(-tensor.nbytes // PIECE_BYTES)


def _piece(tensor: Tensor, number: int) -> Tensor:
    """Bytes of one piece of a contiguous tensor: a view."""
    import torch

    return tensor.view(-1).view(torch.uint8)[number * PIECE_BYTES : (number + 1) * PIECE_BYTES]


def _hash(data: Tensor) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(data.numpy().data)
