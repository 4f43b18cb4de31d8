"""Adapters and exports as zip files: GET /adapter/JOB and GET /export/NAME.zip."""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from fastapi import FastAPI, HTTPException
from starlette.responses import StreamingResponse

from studio import Job, StudioError
from ui.places import Places

CHUNK_BYTES = 1 << 20


def add_downloads(app: FastAPI, places: Places) -> None:
    """Adds the route; a plain `def`, so that it runs beside the event loop."""

    @app.get("/adapter/{name}")
    def adapter(name: str) -> StreamingResponse:
        try:
            job = places.job(name)
        except StudioError as error:
            raise HTTPException(404, str(error)) from None
        if not has_adapter(job):
            raise HTTPException(404, f"{job.name} has no adapter")
        return _sent(adapter_zip(job), f"{job.name}-adapter.zip")

    @app.get("/export/{name}.zip")
    def export(name: str) -> StreamingResponse:
        try:
            folder = places.export(name)
        except StudioError as error:
            raise HTTPException(404, str(error)) from None
        headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name)}.zip"}
        return StreamingResponse(streamed_zip(folder), media_type="application/zip", headers=headers)


def has_adapter(job: Job) -> bool:
    return (job.path / "adapter" / "adapter_config.json").is_file()


def adapter_zip(job: Job) -> IO[bytes]:
    """A nameless file in the job directory that holds the zip; it is gone when closed. Weights do not compress."""
    folder = job.path / "adapter"
    file = tempfile.TemporaryFile(dir=job.path)  # noqa: SIM115 (closed when it has been sent)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink():
                archive.write(path, path.relative_to(folder))
    return file


def _sent(file: IO[bytes], name: str) -> StreamingResponse:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name)}", "Content-Length": str(size)}
    return StreamingResponse(_chunks(file), media_type="application/zip", headers=headers)


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


class _Sink(io.RawIOBase):
    """What a zip is written to piece by piece; `taken` gives what has come since, and nothing of it is kept."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> int:
        self._pieces.append(bytes(piece))
        return len(piece)

    def taken(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


def streamed_zip(folder: Path) -> Iterator[bytes]:
    """The files of a folder, in a folder of its name, as a zip that is made while it is sent."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or path.is_symlink():
                continue
            entry = zipfile.ZipInfo.from_file(path, folder.name / path.relative_to(folder))
            with path.open("rb") as file, archive.open(entry, "w", force_zip64=True) as target:
                while chunk := file.read(CHUNK_BYTES):
                    target.write(chunk)
                    yield sink.taken()
    yield sink.taken()
