"""A model directory in stock transformers, in a process that has none of the studio's code:

    python -I stock_transformers.py QUESTION ANSWER

QUESTION  {"model": directory, "prompts": [[token ids]], "logits": file to write, or null}
ANSWER    {"version", "missing", "unexpected", "mismatched", "not_finite", "tied", "head_is_embedding", "dtype"}
logits    safetensors, `export.{i}` (T, V) float32 of prompt i
"""

import json
import sys
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main(question: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True, "local_files_only": True}
    options["trust_remote_code"] = False
    model, loading = cast(Any, AutoModelForCausalLM.from_pretrained(question["model"], **options))
    model.eval()
    found = {}
    with torch.inference_mode():
        for number, prompt in enumerate(question["prompts"]):
            logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
            found[f"export.{number}"] = logits.float().contiguous()
    if question["logits"]:
        save_file(found, question["logits"])
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return {
        "version": transformers.__version__,
        "missing": sorted(map(str, loading["missing_keys"])),
        "unexpected": sorted(map(str, loading["unexpected_keys"])),
        "mismatched": sorted(map(str, loading["mismatched_keys"])),
        "not_finite": [name for name, logits in found.items() if not torch.isfinite(logits).all()],
        "tied": bool(model.config.get_text_config().tie_word_embeddings),
        "head_is_embedding": head is not None and head.weight.data_ptr() == embedding.weight.data_ptr(),
        "dtype": str(model.dtype),
    }


if __name__ == "__main__":
    answer = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    assert not {"studio", "adapters", "ui"} & set(sys.modules)
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
