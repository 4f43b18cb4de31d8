"""Rows of Parquet files, of Arrow directories and of data sets in the hub's cache: a record batch at a time.

These files give every row every column, so a value that is null is taken as one that the row does not have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio.data.json_text import LONGEST_ROW_BYTES, TOO_LONG, Broken, RowProblems

if TYPE_CHECKING:
    import pyarrow as pa

    from studio.data.files import Progress, Raw

BATCH_ROWS = 256


def parquet_rows(path: Path, progress: Progress | None) -> Iterator[Raw]:
    """The rows of a Parquet file.

    Raises:
        Broken: it is damaged, or no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            batches = file.iter_batches(batch_size=BATCH_ROWS, use_threads=False)
            yield from _rows(batches, str(path), progress, file.metadata.num_rows)
    except pa.ArrowException as error:
        raise Broken(f"cannot be read as Parquet: {_first_line(error)}") from None


def arrow_rows(path: Path, progress: Progress | None) -> Iterator[Raw]:
    """The rows of a directory that `datasets` wrote with save_to_disk.

    Raises:
        Broken: its files are damaged or missing.
    """
    import pyarrow as pa

    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = [path / str(entry["filename"]) for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError):
        raise Broken("its state.json is damaged; write the directory again with save_to_disk") from None
    if state.get("_indices_files"):
        raise Broken("has an index over its rows; write it again: dataset.flatten_indices().save_to_disk(…)")
    try:
        yield from _rows(_batches(files), str(path), progress, 0)
    except pa.ArrowException as error:
        raise Broken(f"cannot be read as Arrow data: {_first_line(error)}") from None


def _batches(files: list[Path]) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    for file in files:
        with pa.OSFile(str(file)) as opened, pa.ipc.open_stream(opened) as reader:
            for batch in reader:
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    yield batch.slice(start, BATCH_ROWS)


def hub_rows(name: str, progress: Progress | None) -> Iterator[Raw]:
    """The rows of "hub:org/name" or "hub:org/name:split", which has been fetched before; without a split, of train.

    Raises:
        Broken: it is not in the hub's cache, has no such split, or `datasets` cannot read it.
    """
    from studio.data.files import Raw

    split = name.removeprefix("hub:").partition(":")[2]
    folder = fetched(name)
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        found = load_dataset(str(folder), split=split or "train", streaming=True)
        for number, row in enumerate(found, 1):
            yield Raw(name, number, _present(row), "row")
            if progress and number % BATCH_ROWS == 0:
                progress(number, 0)
    except (DatasetsError, ValueError, KeyError, OSError) as error:
        raise Broken(f"cannot be read by datasets: {_first_line(error)}") from None


def fetched(name: str) -> Path:
    """The folder of the newest fetched version of "hub:org/name" or "hub:org/name:split", named by its commit.

    Raises:
        Broken: there is none on this machine.
    """
    hub_id = name.removeprefix("hub:").partition(":")[0]
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, repo_type="dataset", local_files_only=True))
    except HFValidationError as error:
        raise Broken(f"is no name of a data set on a hub: {_first_line(error)}") from None
    except LocalEntryNotFoundError:
        command = f"hf download {hub_id} --repo-type dataset"
        raise Broken(
            f"is not on this machine; nothing is fetched while a recipe is read. Fetch it: {command}"
        ) from None


def _rows(batches: Iterator[pa.RecordBatch], name: str, progress: Progress | None, total: int) -> Iterator[Raw]:
    from studio.data.files import Raw

    number = 0
    for batch in batches:
        large = batch.nbytes > LONGEST_ROW_BYTES
        for row in batch.to_pylist():
            number += 1
            too_long = large and _bytes(row) > LONGEST_ROW_BYTES
            yield Raw(name, number, RowProblems(("", TOO_LONG)) if too_long else _present(row), "row")
        if progress:
            progress(number, total)


def _present(value: Any) -> Any:
    """`value` without the keys whose value is null."""
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value


def _bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    if isinstance(value, list):
        return sum(map(_bytes, value))
    return len(value.encode("utf-8", errors="replace")) if isinstance(value, str) else 8


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
