"""Writes tests/numerics/gguf_reference.json: what llama.cpp's own converter and quantiser make of the tiny models.

    python -m tests.numerics.record_gguf --converter LLAMA_CPP_CHECKOUT --libraries DIRECTORY_OF_LIBLLAMA

The checkout holds convert_hf_to_gguf.py; `llama_model_quantize` comes from any build of llama.cpp of about that age,
for example the npm package @node-llama-cpp/linux-x64. Neither is needed to run the tests.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.numerics.gguf_facts import (  # noqa: F401
    DEEP,
    PRE_TOKENIZERS,
    QUANTIZED,
    QUANTS,
    REFERENCE,
    WITH_IMPORTANCE,
    Deep,
    counted,
    importance_of,
    metadata,
    tensors,
    types,
    write_deep,
)
from tests.numerics.gguf_models import MODELS

CONVERT = """
import sys
sys.path[:0] = [sys.argv[1] + "/gguf-py", sys.argv[1]]
import conversion.base as base
pre = sys.argv[2]
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
def no_sentencepiece(self, add_to_gguf=True):
    raise FileNotFoundError
base.TextModel._set_vocab_sentencepiece = no_sentencepiece
sys.argv = ["convert_hf_to_gguf.py", sys.argv[3], "--outtype", sys.argv[5], "--outfile", sys.argv[4]]
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""
"""The converter knows pre-tokenizers by hashes of published vocabularies, and Mixtral's by its SentencePiece file."""


def convert(checkout: Path, model: Path, out: Path, pre: str, kind: str = "f32") -> None:
    command = [sys.executable, "-c", CONVERT, str(checkout), pre, str(model), str(out), kind]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{model.name}: {done.stderr[-2000:]}")


class QuantizeParams(ctypes.Structure):
    """`struct llama_model_quantize_params`."""

    _fields_ = [
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int32),
        ("output_tensor_type", ctypes.c_int32),
        ("token_embedding_type", ctypes.c_int32),
        *((name, ctypes.c_bool) for name in ("requantize", "quantize_output", "copy", "pure", "split", "dry_run")),
        ("imatrix", ctypes.c_void_p),
        ("rest", ctypes.c_uint8 * 128),
    ]


class Importance(ctypes.Structure):
    """`struct llama_model_imatrix_data`; a list of them ends with a null name."""

    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t)]


def quantize(libraries: Path, source: Path, out: Path, file_type: int, importance: dict[str, Any] | None) -> None:
    """In this process: run it in a child."""
    os.chdir(libraries)
    for name in ("libggml-base.so", "libggml-cpu-x64.so", *(path.name for path in libraries.glob("libggml.*"))):
        ctypes.CDLL(str(libraries / name), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(next(libraries.glob("libllama.v*"))))
    library.llama_model_quantize_default_params.restype = QuantizeParams
    library.llama_backend_init()
    params = library.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, 1
    if importance is not None:
        listed = (Importance * (len(importance) + 1))()
        for entry, (name, values) in zip(listed, importance.items(), strict=False):
            entry.name, entry.size = name.encode(), values.numel()
            entry.data = (ctypes.c_float * values.numel())(*values.flatten().tolist())
        params.imatrix = ctypes.addressof(listed)
    if library.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama_model_quantize refuses {source}")


def quantized(libraries: Path, source: Path, work: Path) -> None:
    """Writes work/QUANT.gguf of every quantised type, and "QUANT importance.gguf" of some."""
    child = (
        "from tests.numerics.record_gguf import *\n"
        f"source, work, libraries = Path({str(source)!r}), Path({str(work)!r}), Path({str(libraries)!r})\n"
        "for quant in QUANTIZED:\n"
        "    quantize(libraries, source, work / f'{quant}.gguf', QUANTS[quant], None)\n"
        "for quant in WITH_IMPORTANCE:\n"
        "    quantize(libraries, source, work / f'{quant} importance.gguf', QUANTS[quant], importance_of(source))\n"
    )
    env = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    done = subprocess.run([sys.executable, "-c", child], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{source.name}: {done.stderr[-2000:]}")


def record(name: str, checkout: Path, libraries: Path, work: Path) -> dict[str, Any]:
    model = MODELS[name].save(work / name)
    for quant in ("F32", "F16", "BF16"):
        convert(checkout, model, work / f"{quant}.gguf", PRE_TOKENIZERS[name], quant.lower())
    quantized(libraries, work / "F32.gguf", work)
    names = [*QUANTS, *(f"{quant} importance" for quant in WITH_IMPORTANCE)]
    return {
        "metadata": metadata(work / "F32.gguf"),
        "tensors": tensors(work / "F32.gguf"),
        "types": {found: types(work / f"{found}.gguf") for found in names},
    }


def record_deep(libraries: Path, work: Path, deep: Deep) -> dict[str, Any]:
    """Types alone, of models too large to be built: their matrices are cut to 8 rows of zeros."""
    write_deep(work / "F32.gguf", deep)
    quantized(libraries, work / "F32.gguf", work)
    names = [*QUANTIZED, *(f"{quant} importance" for quant in WITH_IMPORTANCE)]
    return {found: counted(types(work / f"{found}.gguf")[0]) for found in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--converter", type=Path, required=True)
    parser.add_argument("--libraries", type=Path, required=True)
    parser.add_argument("--only", choices=MODELS, nargs="*", default=list(MODELS))
    options = parser.parse_args()
    reference = json.loads(REFERENCE.read_text()) if REFERENCE.exists() else {}
    for name in options.only:
        with tempfile.TemporaryDirectory() as work:
            reference[name] = record(name, options.converter.resolve(), options.libraries.resolve(), Path(work))
        print(name, len(reference[name]["metadata"]), "metadata keys")
    for name, deep in DEEP.items():
        with tempfile.TemporaryDirectory() as work:
            reference.setdefault("deep", {})[name] = record_deep(options.libraries.resolve(), Path(work), deep)
    REFERENCE.write_text(json.dumps(reference, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
