"""An adapter on its base in stock PEFT and stock transformers, in a process that has none of the studio's code:

    python -I stock_peft.py QUESTION ANSWER

QUESTION  {"model": base directory, "adapter": directory, "prompts": [[token ids]], "logits": file to write}
ANSWER    {"version", "transformers", "parameters": trained ones that PEFT found places for, "dtype"}
logits    safetensors, `export.{i}` (T, V) float32 of prompt i
"""

import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main(question: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False}
    base = AutoModelForCausalLM.from_pretrained(question["model"], **options)
    model = peft.PeftModel.from_pretrained(base, question["adapter"]).eval()
    found = {}
    with torch.inference_mode():
        for number, prompt in enumerate(question["prompts"]):
            logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
            found[f"export.{number}"] = logits.float().contiguous()
    save_file(found, question["logits"])
    return {
        "version": peft.__version__,
        "transformers": transformers.__version__,
        "parameters": sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name),
        "dtype": str(model.dtype),
    }


if __name__ == "__main__":
    answer = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    assert not {"studio", "adapters", "ui"} & set(sys.modules)
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
