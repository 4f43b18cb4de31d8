"""Asks the adapter in this folder on its base, with stock transformers and PEFT:  python run.py "your question"

Needs: pip install torch transformers peft accelerate
"""

import argparse
import json
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

HERE = Path(__file__).resolve().parent


def main() -> None:
    options = argparse.ArgumentParser(description="Asks the adapter in this folder.")
    options.add_argument("question")
    options.add_argument("--base", help="folder or hub id of the base, if not the id that the adapter names")
    options.add_argument("--tokens", type=int, default=256, help="the longest answer, in tokens")
    given = options.parse_args()
    named = json.loads((HERE / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    if not given.base and "/" not in named:
        options.error(f"the base model is called {named!r}, which is no name on the hub; give its directory by --base")
    base = given.base or named
    tokenizer = AutoTokenizer.from_pretrained(HERE if (HERE / "tokenizer.json").is_file() else base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, device_map="auto", dtype="auto"), HERE)
    messages = [{"role": "user", "content": given.question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=given.tokens, do_sample=False, streamer=streamer)


if __name__ == "__main__":
    main()
