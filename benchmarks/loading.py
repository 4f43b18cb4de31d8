"""Loading a 2.4 GB bfloat16 checkpoint in nf4: time and peak memory, stock's way and ours.

    python benchmarks/loading.py [--quick] [--json FILE]

Two random checkpoints: `per_expert` (qwen3_moe: one tensor a projection of an expert) and `stacked` (llama4_text: fused
stacks). Each load is a fresh process that has imported everything, the ways take turns, and the files are in the page
cache for all of them. Memory is anonymous memory above that of the process before the load, polled; "held" is what the
loaded model takes. Stock maps the files: pages that it has mapped and not copied are resident, but not anonymous.

    stock               from_pretrained with BitsAndBytesConfig(nf4): the experts stay in 16 bit
    stock + experts     and then bitsandbytes.functional.quantize_4bit for each expert
    ours                adapters.loading.load_base
    ours, first         the same, leaving a packed model in a cache
    ours, cached        the same from that cache
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WAYS = ("stock", "stock + experts", "ours", "ours, first", "ours, cached")
CHECKPOINTS = ("per_expert", "stacked")
ROOT = Path(__file__).parents[1]
PEAK_FACTOR, PEAK_SPARE_BYTES = 1.10, 200_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the size, one repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written for the time of the run")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("RESULT" + json.dumps(measure(*options.one)))
        return
    repeats = 1 if options.quick else options.repeats
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = [row for kind in CHECKPOINTS for row in compare(Path(folder), kind, options.quick, repeats)]
    show(rows)
    if options.json:
        options.json.write_text(json.dumps({"cores": os.cpu_count(), "rows": rows}, indent=2) + "\n")


def compare(folder: Path, kind: str, quick: bool, repeats: int) -> list[dict[str, Any]]:
    """One row a way, with every repeat's seconds and peak."""
    base, cache = folder / kind, folder / "cache"
    size = write_checkpoint(base, kind, layers=1 if quick else 12)
    warm(base)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for repeat in range(repeats):
        for way in WAYS if repeat % 2 == 0 else (*reversed(WAYS[:3]), *WAYS[3:]):
            if way == "ours, first":
                shutil.rmtree(cache, ignore_errors=True)
            run = child(way, base, cache)
            print(f"{kind}, {way}: {run['seconds']:.2f} s, peak {run['peak_bytes'] / 1e6:.0f} MB", file=sys.stderr)
            found[way].append(run)
    shutil.rmtree(base)
    shutil.rmtree(cache)
    return [{"checkpoint": kind, "checkpoint_bytes": size, "way": way, "runs": runs} for way, runs in found.items()]


def child(way: str, base: Path, cache: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", way, str(base), str(cache)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{way}: {done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.rpartition("RESULT")[2])
    return result


def measure(way: str, base: str, cache: str) -> dict[str, Any]:
    """In a process of its own: seconds, peak and held bytes of one load."""
    load = loader(way, Path(base), Path(cache))
    before, peak, stop = anonymous_bytes(), [0], threading.Event()

    def poll() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=poll)
    thread.start()
    start = time.perf_counter()
    model, extra = load()
    seconds = time.perf_counter() - start
    stop.set()
    thread.join()
    peak[0] = max(peak[0], anonymous_bytes())
    return {"seconds": seconds, "peak_bytes": peak[0] - before, "held_bytes": held_bytes(model) + extra}


def loader(way: str, base: Path, cache: Path) -> Callable[[], tuple[Any, int]]:
    """A load that returns the model and the bytes that it holds beside its own tensors. Imports are done before."""
    import bitsandbytes
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.models.llama4 import modeling_llama4
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    del bitsandbytes, AutoModelForCausalLM, BitsAndBytesConfig, modeling_llama4, modeling_qwen3_moe
    torch.set_grad_enabled(False)
    if not way.startswith("ours"):
        return lambda: stock(base, experts=way == "stock + experts")
    from adapters.loading import load_base

    kept = None if way == "ours" else cache
    return lambda: (load_base(base, quantize="nf4", dtype=torch.bfloat16, cache=kept), 0)


def stock(base: Path, experts: bool) -> tuple[Any, int]:
    import bitsandbytes.functional as bnb
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    config = BitsAndBytesConfig(load_in_4bit=True, **options)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16)
    extra = 0
    for module in model.modules() if experts else ():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 3:
                made = [bnb.quantize_4bit(m, compress_statistics=True, quant_type="nf4") for m in parameter.data]
                extra += sum(tensor.nbytes for packed, state in made for tensor in tensors_of(packed, state))
                setattr(module, name, None)
                module.kept = [*getattr(module, "kept", []), *made]
    return model, extra


def tensors_of(packed: Any, state: Any) -> Iterator[Any]:
    """The tensors of one matrix that bitsandbytes quantised."""
    yield packed
    yield state.absmax
    if state.nested:
        yield from (state.state2.absmax, state.offset)


def held_bytes(model: Any) -> int:
    seen = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        for part in tensors_of(tensor, tensor.quant_state) if hasattr(tensor, "quant_state") else (tensor,):
            seen[part.data_ptr()] = part.nbytes
    return sum(seen.values())


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def warm(base: Path) -> None:
    for file in base.iterdir():
        with file.open("rb") as opened:
            while opened.read(2**24):
                pass


COMMON = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


def write_checkpoint(base: Path, kind: str, layers: int) -> int:
    """Writes random bfloat16 weights in shards of 500 MB, tensor by tensor; returns their bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from adapters.layouts import layout_for
    from adapters.tensor_files import write_tensors

    if kind == "per_expert":
        config = AutoConfig.for_model(
            "qwen3_moe", **COMMON, num_hidden_layers=layers, num_experts=32, num_experts_per_tok=2,
            moe_intermediate_size=960, intermediate_size=960, norm_topk_prob=True,
        )  # fmt: skip
    else:
        config = AutoConfig.for_model(
            "llama4_text", **COMMON, num_hidden_layers=layers, num_local_experts=32, num_experts_per_tok=1,
            intermediate_size=928, intermediate_size_mlp=928, interleave_moe_layer_step=1,
        )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    layout = layout_for(config.model_type)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        shapes |= split(layout, name, tuple(tensor.shape))
    size = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    if shutil.disk_usage(base.parent).free < 2 * size:
        sys.exit(f"{base.parent} has no room for {2 * size / 1e9:.1f} GB")
    base.mkdir()
    config.save_pretrained(base)
    shards: list[dict[str, Any]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * torch.Size(s).numel() for _, s in shards[-1].values()) > 500e6:
            shards.append({})
        shards[-1][name] = (torch.bfloat16, shape)
    where = {}
    noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        write_tensors(base / file, shard, lambda name: filled(noise, shapes[name]))
        where |= dict.fromkeys(shard, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return size


def split(layout: Any, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The keys of a checkpoint for one tensor of the model, as the family publishes it."""
    if layout.tensor_class(name) != "routed_experts" or layout.checkpoint == "stacked":
        return {name: shape}
    sources = [layout.sources(name, expert) for expert in range(shape[0])]
    return {source.key: (shape[1] // len(each), shape[2]) for each in sources for source in each}


def filled(noise: Any, shape: tuple[int, ...]) -> Any:
    """Random values, the same ones over and over: making 1.2 billion would take longer than all the loads."""
    import torch

    count = torch.Size(shape).numel()
    return (
        noise.repeat(-(-count // len(noise)))[:count].view(shape) if count > len(noise) else noise[:count].view(shape)
    )


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ("checkpoint", "way", "seconds (least … most)", "held", "peak", "peak / held", "within 1.10 x + 200 MB")
    table = Table(*columns)
    for row in rows:
        seconds, peak, held = (median(row, key) for key in ("seconds", "peak_bytes", "held_bytes"))
        each = [run["seconds"] for run in row["runs"]]
        span = f"{seconds:.2f} ({min(each):.2f} … {max(each):.2f})"
        within = all(r["peak_bytes"] <= PEAK_FACTOR * r["held_bytes"] + PEAK_SPARE_BYTES for r in row["runs"])
        size = f"{row['checkpoint']}, {row['checkpoint_bytes'] / 1e9:.2f} GB"
        sizes = (f"{held / 1e6:.0f} MB", f"{peak / 1e6:.0f} MB", f"{peak / held:.2f}")
        table.add_row(size, row["way"], span, *sizes, "yes" if within else "no")
    console = Console(width=140)
    console.print(table)
    for kind in CHECKPOINTS:
        time_of = {row["way"]: median(row, "seconds") for row in rows if row["checkpoint"] == kind}
        console.print(
            f"{kind}: ours / stock {time_of['ours'] / time_of['stock']:.2f}, "
            f"ours / stock + experts {time_of['ours'] / time_of['stock + experts']:.3f}, "
            f"ours without a cache / cached {time_of['ours'] / time_of['ours, cached']:.1f}, "
            f"first / cached {time_of['ours, first'] / time_of['ours, cached']:.1f}"
        )


def median(row: dict[str, Any], key: str) -> float:
    return statistics.median(run[key] for run in row["runs"])


if __name__ == "__main__":
    main()
