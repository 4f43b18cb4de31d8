"""A program of its own that renders a model's chat template. It imports nothing of the studio: a template comes with a
checkpoint, and may loop for ever or fill the memory.

    python -I render_template.py
    first line in   {"template": text, "special_tokens": {"bos_token": …}, "memory_bytes": n}
    then            {"turns": [{"role", "content", …}], "tools": [schemas] | null, "answer": bool}, a line each
    out             "ready"; then {"text": …} or {"error": …}, a line each

"answer" asks for the start of the assistant's next turn.

What renders is what tokenizers of transformers render with, in its sandbox.
"""

import json
import resource
import sys
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template


def rendered(setting: dict[str, Any], asked: dict[str, Any]) -> dict[str, str]:
    try:
        text = render_jinja_template(
            conversations=[asked["turns"]],
            tools=asked["tools"],
            chat_template=setting["template"],
            add_generation_prompt=asked["answer"],
            **setting["special_tokens"],
        )[0][0]
    except Exception as error:  # whatever a stranger's template raises is the answer
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"text": text}


def main() -> None:
    setting = json.loads(sys.stdin.readline())
    resource.setrlimit(resource.RLIMIT_AS, (setting["memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(rendered(setting, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
