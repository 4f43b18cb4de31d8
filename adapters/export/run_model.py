"""Asks the model in this folder, with stock transformers and nothing else:  python run.py "your question"

Needs: pip install torch transformers accelerate (bitsandbytes too, for a model in 4 bit)
"""

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

HERE = Path(__file__).resolve().parent


def main() -> None:
    options = argparse.ArgumentParser(description="Asks the model in this folder.")
    options.add_argument("question")
    options.add_argument("--tokens", type=int, default=256, help="the longest answer, in tokens")
    given = options.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    model: Any = AutoModelForCausalLM.from_pretrained(HERE, **placed())
    messages = [{"role": "user", "content": given.question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=given.tokens, do_sample=False, streamer=streamer)


def placed() -> dict[str, str]:
    """Over all devices that there are; a model in 4 bit knows its own types."""
    quantized = "quantization_config" in json.loads((HERE / "config.json").read_text(encoding="utf-8"))
    return {"device_map": "auto"} if quantized else {"device_map": "auto", "dtype": "auto"}


if __name__ == "__main__":
    main()
