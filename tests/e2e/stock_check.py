"""Run by the tests in a process of its own: stock transformers and stock PEFT alone, no studio code.

python -I stock_check.py BASE ADAPTER MERGED  →  one JSON object
"""

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base_path, adapter_path, merged_path = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(merged_path)
text = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Pump PMP-2041 at Norwick leaks oil."}], tokenize=False, add_generation_prompt=True
)
ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
merged = AutoModelForCausalLM.from_pretrained(merged_path, dtype=torch.float32)
base_logits, merged_logits = logits(base), logits(merged)
after = dict(merged.named_parameters())
deltas = {
    f"{name}[{expert}]": (after[name][expert] - parameter[expert]).abs().max().item()
    for name, parameter in base.named_parameters()
    if parameter.ndim == 3
    for expert in range(len(parameter))
}
adapted_logits = logits(PeftModel.from_pretrained(base, adapter_path))
assert not {"studio", "adapters", "ui"} & set(sys.modules)
print(
    json.dumps(
        {
            "adapter_minus_merged": (adapted_logits - merged_logits).abs().max().item(),
            "adapter_minus_base": (adapted_logits - base_logits).abs().max().item(),
            "expert_deltas": deltas,
            "chat_template": tokenizer.chat_template is not None,
        }
    )
)
