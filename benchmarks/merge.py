"""Merging on random checkpoints of 2.7 GB in both layouts: time, peak memory, and that the results are equal.

    python benchmarks/merge.py [--quick] [--json FILE] [--large]

Each way runs in a process of its own, the ways by turns, with the checkpoint in the page cache. The peak is the
process's whole resident memory, imports included.

    plain          read, sha256 and write the same bytes: what no merge can be under
    PEFT           from_pretrained in the files' bfloat16, PeftModel, merge_and_unload, save_pretrained
    PEFT float32   the same in float32, rounded at the end: what the others are compared with
    ours           adapters.merge.merge_adapter, verified in the table: bit for bit PEFT float32

PEFT in bfloat16 rounds an expert's delta before it adds it, and the sum again; ours rounds once. --large merges a
checkpoint of 20 GB and writes it as Q4_K_M, under a limit of 2 GB of memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
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

WAYS = ("plain", "PEFT", "PEFT float32", "ours")
CHECKPOINTS = ("per_expert", "stacked")
RANK = 16
LARGE_LAYERS, LARGE_LIMIT_BYTES = 105, 2 * 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a twelfth of the size, one repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    parser.add_argument("--large", action="store_true", help="the 20 GB checkpoint instead; needs 45 GB of disk")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written for the time of the run")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--limit-bytes", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way, *paths = options.one
        if options.limit_bytes:  # of all memory that is not a file's: more is refused, not only counted
            resource.setrlimit(resource.RLIMIT_DATA, (options.limit_bytes, options.limit_bytes))
        print("RESULT" + json.dumps(measure(way, *map(Path, paths))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.large:
            rows = large(Path(folder), layers=2 if options.quick else LARGE_LAYERS)
        else:
            repeats = 1 if options.quick else options.repeats
            layers = 1 if options.quick else 12
            rows = [row for kind in CHECKPOINTS for row in compare(Path(folder), kind, layers, repeats)]
    show(rows)
    if options.json:
        options.json.write_text(json.dumps({"cores": os.cpu_count(), "rows": rows}, indent=2) + "\n")


def compare(folder: Path, kind: str, layers: int, repeats: int) -> list[dict[str, Any]]:
    """One row a way, with every repeat's seconds and peak, and how the result compares with PEFT's in float32."""
    from benchmarks.loading import warm, write_checkpoint

    base, adapter, out = folder / kind, folder / f"{kind}-adapter", folder / f"{kind}-out"
    size = write_checkpoint(base, kind, layers)
    write_adapter(base, adapter)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    equal: dict[str, dict[str, Any]] = {}
    reference: dict[str, str] = {}
    for repeat in range(repeats):
        for way in ("PEFT float32", *(way for way in WAYS if way != "PEFT float32")):
            if way == "PEFT float32" and repeat:
                continue
            shutil.rmtree(out, ignore_errors=True)
            warm(base)
            found[way].append(run := child(way, base, adapter, out))
            print(f"{kind}, {way}: {run['seconds']:.2f} s, peak {run['peak_bytes'] / 1e6:.0f} MB", file=sys.stderr)
            if repeat == 0 and way != "plain":
                hashes = tensor_hashes(out)
                reference = reference or hashes
                same = sum(hashes.get(key) == value for key, value in reference.items())
                equal[way] = {"tensors": len(reference), "equal": same, "names": hashes.keys() == reference.keys()}
    for path in (base, adapter, out):
        shutil.rmtree(path, ignore_errors=True)
    return [
        {"checkpoint": kind, "checkpoint_bytes": size, "way": way, "runs": found[way], **equal.get(way, {})}
        for way in WAYS
    ]


def child(way: str, base: Path, adapter: Path, out: Path, limit_bytes: int | None = None) -> dict[str, Any]:
    limited = ["--limit-bytes", str(limit_bytes)] if limit_bytes else []
    command = [sys.executable, __file__, "--one", way, str(base), str(adapter), str(out), *limited]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{way}: {done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.rpartition("RESULT")[2])
    return result


def measure(way: str, base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """In a process of its own: seconds of the work, imports aside, and the peak of the whole process."""
    work = {"plain": plain, "ours": ours, "PEFT": stock, "PEFT float32": stock_float32, "Q4_K_M": to_gguf}[way]
    load_modules(way)
    start = time.perf_counter()
    work(base, adapter, out)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """Of this program alone: getrusage would count what the parent held before it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def load_modules(way: str) -> None:
    if way == "ours":
        import adapters.merge  # noqa: F401
    elif way.startswith("PEFT"):
        import peft  # noqa: F401
        from transformers.models.llama4 import modeling_llama4  # noqa: F401
        from transformers.models.qwen3_moe import modeling_qwen3_moe  # noqa: F401


def plain(base: Path, adapter: Path, out: Path) -> None:
    out.mkdir()
    for file in sorted(base.glob("*.safetensors")):
        found = hashlib.sha256()
        with file.open("rb") as source, (out / file.name).open("wb") as target:
            while piece := source.read(1 << 22):
                found.update(piece)
                target.write(piece)
            target.flush()
            os.fsync(target.fileno())


def ours(base: Path, adapter: Path, out: Path) -> None:
    from adapters.merge import merge_adapter

    merge_adapter(base, adapter, out)


def stock(base: Path, adapter: Path, out: Path) -> None:
    import torch

    peft_merge(base, adapter, torch.bfloat16).save_pretrained(out)


def stock_float32(base: Path, adapter: Path, out: Path) -> None:
    import torch

    peft_merge(base, adapter, torch.float32).to(torch.bfloat16).save_pretrained(out)


def peft_merge(base: Path, adapter: Path, dtype: Any) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def to_gguf(base: Path, adapter: Path, out: Path) -> None:
    from adapters.export import EXPORTERS, Options, Source

    out.mkdir()
    EXPORTERS["gguf"].write(Source(base, adapter, "benchmark"), out, Options(quant="Q4_K_M"))


def write_adapter(base: Path, adapter: Path) -> None:
    """A random adapter on attention and all routed experts, of rank 16."""
    import torch
    from safetensors.torch import save_file

    from adapters.adapter_files import CONFIG, PREFIX, WEIGHTS, ExpertFactors, to_peft
    from adapters.checkpoint import read_config, read_index
    from adapters.layouts import layout_for, moe_shapes
    from adapters.peft_files import standard_config
    from adapters.placement import Placement, same_experts_everywhere

    config, index = read_config(base), read_index(base)
    layout = layout_for(config, index)
    shapes = moe_shapes(layout, index, config)
    made = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Any:
        return torch.randn(shape, generator=made) * 0.02

    tensors = {}
    for key, info in index.items():
        if layout.tensor_class(key) == "attention" and layout.takes_lora(key):
            module = PREFIX + key.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = noise(RANK, info.shape[1])
            tensors[f"{module}.lora_B.weight"] = noise(info.shape[0], RANK)
    for shape in shapes:
        place = f"{PREFIX}model.layers.{shape.layer}.{layout.block}.{layout.experts}"
        sides = {f"{place}.base_layer": (shape.hidden, 2 * shape.width), place: (shape.width, shape.hidden)}
        for module, (inputs, outputs) in sides.items():
            factors = ExpertFactors(noise(shape.experts, RANK, inputs), noise(shape.experts, outputs, RANK), 1.0)
            pair = to_peft(factors, layout)
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = (t.contiguous() for t in pair)
    ranks = same_experts_everywhere(RANK, len(shapes), shapes[0].experts)
    adapter.mkdir()
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    placement = Placement(attention=RANK, routed=ranks, alpha=2 * RANK)
    standard_config(layout, placement, str(base), shapes[0].experts).save_pretrained(str(adapter))
    assert (adapter / CONFIG).is_file()


def tensor_hashes(directory: Path) -> dict[str, str]:
    """sha256 of each tensor's bytes, dtype and shape."""
    from adapters.checkpoint import read_index

    found = {}
    for key, info in read_index(directory).items():
        with info.file.open("rb") as file:
            file.seek(info.start)
            found[key] = f"{info.dtype}{info.shape}{hashlib.sha256(file.read(info.size_bytes)).hexdigest()}"
    return found


def large(folder: Path, layers: int) -> list[dict[str, Any]]:
    """Merged and written as Q4_K_M without a stop in between, each under the limit."""
    from adapters.export import EXPORTERS
    from benchmarks.gguf_export import add_tokenizer
    from benchmarks.loading import write_checkpoint

    if "gguf" not in EXPORTERS:
        sys.exit("the format gguf is not there")
    base, adapter = folder / "large", folder / "large-adapter"
    size = write_checkpoint(base, "per_expert", layers)
    add_tokenizer(base)
    write_adapter(base, adapter)
    rows = []
    for way in ("ours", "Q4_K_M"):
        out = folder / way
        run = child(way, base, adapter, out, LARGE_LIMIT_BYTES)
        shutil.rmtree(out, ignore_errors=True)
        rows.append({"checkpoint": "per_expert", "checkpoint_bytes": size, "way": way, "runs": [run]})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    heads = ("checkpoint", "way", "seconds (least … most)", "peak", "time / PEFT", "peak / PEFT", "equal to float32")
    table = Table(*heads)
    for row in rows:
        same = [other for other in rows if other["checkpoint"] == row["checkpoint"] and other["way"] == "PEFT"]
        each = [run["seconds"] for run in row["runs"]]
        ratios = [f"{median(row, key) / median(same[0], key):.2f}" if same else "" for key in ("seconds", "peak_bytes")]
        table.add_row(
            f"{row['checkpoint']}, {row['checkpoint_bytes'] / 1e9:.2f} GB",
            row["way"],
            f"{median(row, 'seconds'):.2f} ({min(each):.2f} … {max(each):.2f})",
            f"{median(row, 'peak_bytes') / 1e6:.0f} MB",
            *ratios,
            f"{row['equal']} of {row['tensors']} tensors" if "equal" in row else "",
        )
    console = Console(width=140)
    console.print(table)
    for row in rows:
        plain_rows = [o for o in rows if o["checkpoint"] == row["checkpoint"] and o["way"] == "plain"]
        if row["way"] == "ours" and plain_rows:
            ratio = median(row, "seconds") / median(plain_rows[0], "seconds")
            console.print(f"{row['checkpoint']}: ours / plain read, sha256 and write {ratio:.2f}")


def median(row: dict[str, Any], key: str) -> float:
    return statistics.median(run[key] for run in row["runs"])


if __name__ == "__main__":
    main()
