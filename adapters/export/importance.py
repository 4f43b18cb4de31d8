"""An importance matrix: how much an error in each column of each matrix matters, measured on the user's own data.

For every matrix that multiplies hidden states, the mean of the squared inputs by column; for experts by expert, over
the tokens routed to it. Files are llama.cpp's own (GGUF, `general.type` "imatrix": sums and counts by tensor), so those
that its tool llama-imatrix wrote are read as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter
from torch import Tensor

from adapters.errors import ExportError
from adapters.export import Source, is_importance_matrix
from adapters.verify.fresh import ask_module

SUMS, COUNTS = ".in_sum2", ".counts"


def importance_for(file: Path, source: Source, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The importance that `file` says: an importance matrix, or examples that it is measured on, in another process.

    Args:
        shapes: of the tensors of the GGUF file to be written.

    Raises:
        ExportError: the file cannot be read, is of another model, or the model is too large to be run here.
    """
    with importance_file(file, source) as matrix:
        return read_importance(matrix, shapes)


@contextmanager
def importance_file(file: Path, source: Source) -> Iterator[Path]:
    """`file` itself where it is an importance matrix; else what is measured on it, for as long as the block runs."""
    if is_importance_matrix(file):
        yield file
        return
    with tempfile.TemporaryDirectory(prefix="importance-") as folder:
        measured = Path(folder) / "importance.gguf"
        ask_module("adapters.export.measure_importance", {"source": asdict(source), "examples": file, "out": measured})
        yield measured


def read_importance(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The importance of each column: {tensor: (matrices, columns) float32}.

    An expert that no token reached gets 1 everywhere, as in llama.cpp.

    Args:
        shapes: of the tensors of the file to be written.

    Raises:
        ExportError: no such file, or made for a model of other shapes.
    """
    try:
        tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in GGUFReader(file).tensors}
    except (OSError, ValueError, LookupError) as error:
        raise ExportError(f"{file} is no importance matrix (a GGUF file with sums and counts): {error}") from None
    found = {}
    for name in (name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS)):
        sums, counts = tensors[name + SUMS].float(), tensors[name + COUNTS].float().reshape(-1, 1)
        shape = shapes.get(name)
        matrices = shape[0] if shape and len(shape) == 3 else 1
        if shape is None or tuple(sums.reshape(-1, sums.shape[-1]).shape) != (matrices, shape[-1]):
            raise ExportError(
                f"{file} has {name} as {tuple(sums.shape)}, this model has {shape}: it is another model's"
            )
        found[name] = torch.where(counts > 0, sums.reshape(matrices, -1) / counts.clamp(min=1), 1.0)
    if not found:
        raise ExportError(f"{file} holds no importance of any tensor")
    return found


def write_importance(file: Path, sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], tokens: int) -> None:
    """Writes the sums (matrices, columns) of squared inputs and the counts (matrices,) of tokens that they are over."""
    writer = GGUFWriter(file, "imatrix")
    writer.add_type("imatrix")
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", tokens)
    writer.add_array("imatrix.datasets", ["moe-studio"])
    for name, values in sums.items():
        writer.add_tensor(name + SUMS, values.float().numpy())
        writer.add_tensor(name + COUNTS, counts[name].float().reshape(-1, 1).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
