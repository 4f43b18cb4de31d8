"""The quickstart's instruction data: maintenance tickets in, one-line JSON records out.

    python -m studio.base.tickets --out recipes/data

And the same tickets with the site alone as the answer, for the recipes that learn from rewards: the base names it
now and then as it is; and as plain text without an answer, for continued pretraining.

The asset and the site are copied from the ticket; the fault class and the priority are inferred from its phrasing.
Every asset number belongs to one split only, so no held-out ticket or record occurs in the training data.
"""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from studio.base.shipped_files import Files, run
from studio.base.words import EQUIPMENT, FAULTS, LIQUIDS, PARTS, PEOPLE, SITES, URGENCIES

TRAIN_ROWS, EVAL_ROWS = 2400, 240
SITE_ROWS = {"train": 600, "eval": 120}
"""Rows of the sites and of the notes."""

TEMPLATES: tuple[str, ...] = (
    "{Machine} {asset} at {site} {symptom}. {urgency}",
    "{urgency} {asset} in {site} {symptom}.",
    "Hello, this is {person} from {site}. Our {machine} {asset} {symptom}. {urgency}",
    "{site} here: {asset} {symptom}. {urgency} Thanks, {person}",
    "Ticket from {person}, {site}: the {machine} with tag {asset} {symptom}. {urgency}",
    "{asset} {symptom}. The place is {site}. {urgency}",
    "Can somebody look at {asset}? It {symptom}. {urgency} We are at {site}.",
    "In {site} the {machine} {symptom}. Its tag is {asset}. {urgency}",
    "{urgency} The {machine} here {symptom}. Site {site}, asset {asset}. {person}",
    "{person} says that {asset} {symptom}. Go to {site}. {urgency}",
    "Since this morning {asset} {symptom}. {urgency} Ask for {person} at {site}.",
    "New problem at {site}: our {machine} {symptom}. {urgency} Number {asset}.",
)

Row = dict[str, list[dict[str, str]]]


def ticket(rng: random.Random, asset_number: int) -> Row:
    """Return one row: the user's ticket and the assistant's record of it."""
    prefix = rng.choice(tuple(EQUIPMENT))
    asset, site = f"{prefix}-{asset_number:04d}", rng.choice(SITES)
    fault, priority = rng.choice(tuple(FAULTS)), rng.choice(tuple(URGENCIES))
    text = rng.choice(TEMPLATES).format(
        asset=asset,
        site=site,
        machine=EQUIPMENT[prefix],
        Machine=EQUIPMENT[prefix].capitalize(),
        person=rng.choice(PEOPLE),
        symptom=rng.choice(FAULTS[fault]).format(part=rng.choice(PARTS), liquid=rng.choice(LIQUIDS)),
        urgency=rng.choice(URGENCIES[priority]),
    )
    record = {"asset": asset, "site": site, "fault": fault, "priority": priority}
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": json.dumps(record)}]}


def tickets(seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Return the training and the held-out rows; the same seed always gives the same rows."""
    rng = random.Random(f"tickets/{seed}")
    numbers = rng.sample(range(10_000), TRAIN_ROWS + EVAL_ROWS)
    rows = [ticket(rng, number) for number in numbers]
    return rows[:TRAIN_ROWS], rows[TRAIN_ROWS:]


def ticket_files(seed: int = 0) -> Files:
    """Return the rows of tickets-*, sites-* and notes-*, train and eval each."""
    files: dict[str, Sequence[Mapping[str, Any]]] = {}
    for name, rows in zip(("train", "eval"), tickets(seed), strict=True):
        files[f"tickets-{name}"] = rows
        files[f"sites-{name}"] = [named_site(row) for row in rows[: SITE_ROWS[name]]]
        files[f"notes-{name}"] = [note(row) for row in rows[: SITE_ROWS[name]]]
    return files


def named_site(row: Row) -> Row:
    """The ticket with the name of its site as the answer."""
    ask, answer = row["messages"]
    return {"messages": [ask, {"role": "assistant", "content": json.loads(answer["content"])["site"]}]}


def note(row: Row) -> dict[str, str]:
    """The ticket's text alone."""
    return {"text": row["messages"][0]["content"]}


if __name__ == "__main__":
    run("tickets", __doc__, ticket_files)
