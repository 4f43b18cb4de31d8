"""GGUF from random checkpoints of 2.7 GB in both layouts: time and peak memory, against llama.cpp's own converter.

    python benchmarks/gguf_export.py [--quick] [--json FILE] [--converter LLAMA_CPP_CHECKOUT]

Each way runs in a process of its own, the ways by turns, with the checkpoint in the page cache. Seconds are those of
the whole process, imports included, since both are started anew for each model; the peak is the resident memory of the
largest process: ours quantises in a child.
With a checkout of llama.cpp its convert_hf_to_gguf.py makes the same files, and the tensors' bytes are compared. It has
no K-quants: a Q4_K_M of ours is timed alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

CHECKPOINTS = ("per_expert", "stacked")
QUANTS = ("BF16", "Q8_0", "Q4_K_M")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CLASSES = {"qwen3_moe": "Qwen3MoeForCausalLM", "llama4_text": "Llama4ForCausalLM"}
PEAK = """
import atexit, re, resource
def peak():
    own = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
atexit.register(lambda: print("PEAK", peak()))
"""
OURS = """
import sys
from pathlib import Path
from adapters.export import EXPORTERS, Options, Source
EXPORTERS["gguf"].write(Source(Path(sys.argv[1]), None, "benchmark"), Path(sys.argv[2]), Options(quant=sys.argv[3]))
"""
CONVERTER = """
import sys
sys.path[:0] = [sys.argv[4] + "/gguf-py", sys.argv[4]]
import conversion.base as base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"  # it knows published vocabularies by hash
sys.argv[1:] = [sys.argv[1], "--outfile", sys.argv[2] + "/model.gguf", "--outtype", sys.argv[3].lower()]
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a twelfth of the size, one repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    parser.add_argument("--converter", type=Path, help="a checkout of llama.cpp to compare with")
    parser.add_argument("--folder", type=Path, help="where the files are written for the time of the run")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for kind in CHECKPOINTS:
            repeats, layers = (1, 1) if options.quick else (options.repeats, 12)
            rows += compare(Path(folder), kind, layers, repeats, options.converter)
    show(rows)
    if options.json:
        options.json.write_text(json.dumps({"cores": os.cpu_count(), "rows": rows}, indent=2) + "\n")


def compare(folder: Path, kind: str, layers: int, repeats: int, converter: Path | None) -> list[dict[str, Any]]:
    from benchmarks.loading import warm, write_checkpoint

    base, out = folder / kind, folder / "out"
    size = write_checkpoint(base, kind, layers)
    add_tokenizer(base)
    ways = [("ours", quant) for quant in QUANTS]
    ways += [("converter", quant) for quant in QUANTS[:2]] if converter else []
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, quant in ways:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            warm(base)
            run = timed(OURS if way == "ours" else CONVERTER, base, out, quant, str(converter or ""))
            run["tensors"] = hash_of_tensors(next(out.glob("*.gguf")))
            runs[way, quant].append(run)
            print(f"{kind} {way} {quant}: {run['seconds']:.1f} s, {run['peak_bytes'] / 1e6:.0f} MB", file=sys.stderr)
    shutil.rmtree(base)
    return [
        {"checkpoint": kind, "checkpoint_bytes": size, "way": way, "quant": quant, "runs": found}
        for (way, quant), found in runs.items()
    ]


def add_tokenizer(base: Path) -> None:
    """The embedded base's, whose ids the checkpoint has too; and the class's name, by which the converter goes."""
    for name in TOKENIZER:
        shutil.copy(ROOT / "studio" / "base" / "model" / name, base / name)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": [CLASSES[config["model_type"]]]}))


def timed(program: str, base: Path, out: Path, quant: str, converter: str) -> dict[str, Any]:
    command = [sys.executable, "-c", PEAK + program, str(base), str(out), quant, converter]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return {"seconds": seconds, "peak_bytes": 1024 * int(done.stdout.rpartition("PEAK")[2])}


def hash_of_tensors(file: Path) -> str:
    """One hash of all tensors' bytes by name."""
    from gguf import GGUFReader

    found = hashlib.sha256()
    for tensor in sorted(GGUFReader(file).tensors, key=lambda tensor: tensor.name):
        found.update(tensor.name.encode() + tensor.data.tobytes())
    return found.hexdigest()


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("checkpoint", "type", "way", "seconds (least … most)", "peak", "time / converter", "same bytes")
    for row in rows:
        other = next((o for o in rows if o["way"] == "converter" and same_file(o, row)), None)
        seconds = [run["seconds"] for run in row["runs"]]
        ratio = f"{median(row, 'seconds') / median(other, 'seconds'):.2f}" if other and other is not row else ""
        equal = str(row["runs"][0]["tensors"] == other["runs"][0]["tensors"]) if ratio and other else ""
        table.add_row(
            f"{row['checkpoint']}, {row['checkpoint_bytes'] / 1e9:.2f} GB",
            row["quant"],
            row["way"],
            f"{median(row, 'seconds'):.1f} ({min(seconds):.1f} … {max(seconds):.1f})",
            f"{median(row, 'peak_bytes') / 1e6:.0f} MB",
            ratio,
            equal,
        )
    Console(width=140).print(table)


def same_file(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return (one["checkpoint"], one["quant"]) == (other["checkpoint"], other["quant"])


def median(row: dict[str, Any], key: str) -> float:
    return statistics.median(run[key] for run in row["runs"])


if __name__ == "__main__":
    main()
