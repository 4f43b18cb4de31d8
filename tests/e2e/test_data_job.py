"""One job from data as users have them: ShareGPT in gzip, other column names, bad rows that are dropped and listed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from tests.e2e.conftest import studio, write_recipe

TICKETS = Path(__file__).parents[2] / "recipes" / "data" / "tickets-train.jsonl"


def as_sharegpt(row: dict[str, Any]) -> str:
    names = {"user": "human", "assistant": "gpt"}
    return json.dumps({"chat": [{"from": names[turn["role"]], "value": turn["content"]} for turn in row["messages"]]})


def test_bad_rows_are_refused_with_their_lines_or_dropped_and_listed(tmp_path: Path) -> None:
    rows = [as_sharegpt(json.loads(line)) for line in TICKETS.read_text().splitlines()[:40]]
    long = {"chat": [{"from": "human", "value": "word " * 400}, {"from": "gpt", "value": "x"}]}
    almost = {"chat": [{"from": "human", "value": "x" * 124}, {"from": "gpt", "value": "x"}]}
    rows[10], rows[20], rows[30] = "{", json.dumps(long), json.dumps(almost)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    data = {
        "train": str(tmp_path / "rows.jsonl.gz"),
        "eval": str(TICKETS.with_name("tickets-eval.jsonl")),
        "columns": {"messages": "chat"},
        "max_length_tokens": 128,
    }
    recipe = write_recipe(tmp_path / "recipe.yaml", data=data, training={"max_steps": 2})
    refused = studio("run", recipe)
    assert refused.returncode == 1 and "rows.jsonl.gz: 1 problem\n  - line 11: is not valid JSON" in refused.stderr
    recipe = write_recipe(
        tmp_path / "recipe.yaml", data={**data, "bad_rows": "drop"}, training={"max_steps": 2}, router={"watch": False}
    )
    planned = json.loads(studio("plan", recipe, "--json").stdout)
    assert (planned["train_examples"], planned["dropped_rows"]) == (38, 2)
    assert any("2 bad rows are dropped; the first: rows.jsonl.gz, line 11: " in said for said in planned["warnings"])
    done = studio("run", recipe)
    assert done.returncode == 0, done.stderr + done.stdout
    listed = [json.loads(line) for line in (tmp_path / "job" / "dropped_rows.jsonl").read_text().splitlines()]
    assert [row["line"] for row in listed] == [11, 21, 31], "the last is too long only as the template writes it"
    assert {row["file"] for row in listed} == {str(tmp_path / "rows.jsonl.gz")}
    assert all(row["reason"].startswith("prompt: has ") for row in listed[1:])
