"""Seeded generators of the eight pretraining domains.

Each domain has its own vocabulary and surface, so that a router has something to tell apart:

    arithmetic  sums, products and comparisons           37 + 58 = 95
    dates       weekdays, intervals, calendar notation    14 March 2024 is a Thursday.
    records     one-line JSON objects of many schemas     {"name": "Greta", "age": 41}
    code        short functions and loops                 def add(a, b): return a + b
    prose       small stories in plain past tense         The old fox walked to the river.
    logs        key=value lines of a running plant        ts=10:22:07 level=warn unit=PMP-4821 temp=88
    reports     workshop notes that restate their facts   Greta checked PMP-4821 in Norwick. ...
    copying     echo and look-up over random items        a=73; k=12; q=55; k? 12

A document is a list of chat turns, or one plain text. Wrapping part of every domain as a chat teaches the special
tokens and the chat format; reports, copying and the look-ups in records and logs teach induction: finding an
identifier in the context and writing it again. No domain holds a ticket or asks for a record made from a text.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from studio.base import plain_text, plant_text
from studio.base.plain_text import Turn


@dataclass(frozen=True)
class Document:
    """One pretraining document: plain text, or chat turns when `turns` is not empty."""

    domain: str
    text: str = ""
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Domain:
    """How one domain writes plain text and chat turns, and its share of the documents that are chats."""

    text: Callable[[random.Random], str]
    turn: Callable[[random.Random], Turn]
    chat_fraction: float


DOMAINS: dict[str, Domain] = {
    "arithmetic": Domain(plain_text.arithmetic_text, plain_text.arithmetic_turn, 0.3),
    "dates": Domain(plain_text.dates_text, plain_text.dates_turn, 0.3),
    "records": Domain(plant_text.records_text, plant_text.records_turn, 0.4),
    "code": Domain(plain_text.code_text, plain_text.code_turn, 0.15),
    "prose": Domain(plain_text.prose_text, plain_text.prose_turn, 0.2),
    "logs": Domain(plant_text.logs_text, plant_text.logs_turn, 0.3),
    "reports": Domain(plant_text.reports_text, plant_text.reports_turn, 0.5),
    "copying": Domain(plant_text.copying_text, plant_text.copying_turn, 0.4),
}


def documents(domain: str, seed: int) -> Iterator[Document]:
    """Yield the endless stream of documents of `domain`; the same seed always gives the same stream."""
    rng = random.Random(f"{domain}/{seed}")
    kind = DOMAINS[domain]
    while True:
        if rng.random() < kind.chat_fraction:
            turns = tuple(kind.turn(rng) for _ in range(1 if rng.random() < 0.7 else 2))
            yield Document(domain, turns=turns)
        else:
            yield Document(domain, text=kind.text(rng))
