"""The shipped preference data: for each maintenance ticket a right record, and one with a single flaw.

    python -m studio.base.ticket_pairs --out recipes/data

Half of the flaws are wrong values, drawn from all others so that no class is wrong more often; the embedded base can
tell them no better than a coin. Half are of form, a missing brace, which it always sees, and a missing field, which it
never does: the shorter text is the more probable one. The flaw is named as the row's source. Each asset number belongs
to one split only.
"""

import json
import random
from collections.abc import Callable
from typing import Any

from studio.base.shipped_files import Files, run
from studio.base.tickets import ticket
from studio.base.words import FAULTS, URGENCIES

TRAIN_ROWS, EVAL_ROWS = 2400, 240

Record = dict[str, str]


def _other(rng: random.Random, value: str, values: Any) -> str:
    return rng.choice([one for one in values if one != value])


def _wrong_fault(rng: random.Random, record: Record) -> str:
    return json.dumps({**record, "fault": _other(rng, record["fault"], FAULTS)})


def _wrong_priority(rng: random.Random, record: Record) -> str:
    return json.dumps({**record, "priority": _other(rng, record["priority"], URGENCIES)})


def _not_closed(rng: random.Random, record: Record) -> str:
    return json.dumps(record).removesuffix("}")


def _a_field_missing(rng: random.Random, record: Record) -> str:
    dropped = rng.choice(("fault", "priority"))
    return json.dumps({name: value for name, value in record.items() if name != dropped})


FLAWS: dict[str, Callable[[random.Random, Record], str]] = {
    "wrong fault": _wrong_fault,
    "wrong priority": _wrong_priority,
    "not closed": _not_closed,
    "a field missing": _a_field_missing,
}


def pair(rng: random.Random, asset_number: int, flaw: str) -> dict[str, Any]:
    """One row: the ticket, its record, and the record with the flaw."""
    user, answer = ticket(rng, asset_number)["messages"]
    rejected = FLAWS[flaw](rng, json.loads(answer["content"]))
    return {"prompt": user["content"], "chosen": answer["content"], "rejected": rejected, "source": flaw}


def ticket_pairs(seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training and the held-out rows; the same seed always gives the same rows."""
    rng = random.Random(f"ticket pairs/{seed}")
    numbers = rng.sample(range(10_000), TRAIN_ROWS + EVAL_ROWS)
    flaws = list(FLAWS)
    rows = [pair(rng, number, flaws[place % len(flaws)]) for place, number in enumerate(numbers)]
    train, held_out = rows[:TRAIN_ROWS], rows[TRAIN_ROWS:]
    rng.shuffle(train)
    return train, held_out


def pair_files(seed: int = 0) -> Files:
    """Return the rows of ticket-pairs-train and ticket-pairs-eval."""
    return dict(zip(("ticket-pairs-train", "ticket-pairs-eval"), ticket_pairs(seed), strict=True))


if __name__ == "__main__":
    run("ticket_pairs", __doc__, pair_files)
