"""Texts and chat turns of the four domains that carry identifiers: records, logs, reports, copying.

They teach induction: an identifier stands in the context, and is written again where it is asked for or restated.
Every function takes a `random.Random` and returns one document's text, or one (question, answer) turn.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from studio.base.plain_text import ANIMALS, PLACES, THINGS, Turn
from studio.base.words import EQUIPMENT, FAULTS, LETTERS, LIQUIDS, PARTS, PEOPLE, SITES, TIMES, URGENCIES


def asset_id(rng: random.Random) -> str:
    """Return an identifier such as `PMP-4821`."""
    return f"{rng.choice(tuple(EQUIPMENT))}-{rng.randint(0, 9999):04d}"


def _code_word(rng: random.Random) -> str:
    """Return a random identifier of letters and digits, such as `QX-07` or `B4417`."""
    letters = "".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 3)))
    digits = "".join(rng.choice("0123456789") for _ in range(rng.choice((2, 4))))
    return f"{letters}{rng.choice(('-', '-', '', '/'))}{digits}"


# records -------------------------------------------------------------------------------------------------------------

_FIELDS: dict[str, Callable[[random.Random], object]] = {
    "name": lambda rng: rng.choice(PEOPLE),
    "age": lambda rng: rng.randint(18, 80),
    "city": lambda rng: rng.choice(SITES),
    "site": lambda rng: rng.choice(SITES),
    "id": lambda rng: rng.randint(0, 9999),
    "code": _code_word,
    "asset": asset_id,
    "unit": asset_id,
    "type": lambda rng: rng.choice(tuple(EQUIPMENT.values())),
    "part": lambda rng: rng.choice(PARTS),
    "state": lambda rng: rng.choice(("open", "closed", "running", "stopped", "new", "leak", "noise", "wear", "heat")),
    "level": lambda rng: rng.choice(("low", "medium", "high", "critical", "normal")),
    "color": lambda rng: rng.choice(("red", "green", "blue", "black", "white", "grey")),
    "active": lambda rng: rng.choice((True, False)),
    "price": lambda rng: rng.randint(1, 99) + rng.choice((0.5, 0.25, 0.75)),
    "tags": lambda rng: rng.sample(PARTS, 2),
    "owner": lambda rng: rng.choice(PEOPLE),
    "fault": lambda rng: rng.choice(("none", "leak", "noise", "wear", "vibration", "blockage", "electrical", "heat")),
    "priority": lambda rng: rng.randint(1, 5),
    "count": lambda rng: rng.randint(0, 99),
}


def _record(rng: random.Random) -> dict[str, object]:
    keys = rng.sample(tuple(_FIELDS), rng.randint(2, 5))
    return {key: _FIELDS[key](rng) for key in keys}


def records_text(rng: random.Random) -> str:
    record = _record(rng)
    if rng.random() < 0.3:
        record[rng.choice(("item", "data", "meta"))] = dict(list(_record(rng).items())[:2])
    lines = [json.dumps(record)]
    if rng.random() < 0.6:  # the same schema again
        lines.append(json.dumps({key: _FIELDS[key](rng) if key in _FIELDS else record[key] for key in record}))
    return "\n".join(lines)


def records_turn(rng: random.Random) -> Turn:
    record = _record(rng)
    key = rng.choice(tuple(record))
    if rng.random() < 0.4:
        order = rng.sample(tuple(record), len(record))
        question = rng.choice(("Sort the keys as {}: {}", "Keep only {} of {}"))
        if question.startswith("Keep"):
            order = order[: max(1, len(order) - 1)]
        return question.format(", ".join(order), json.dumps(record)), json.dumps({name: record[name] for name in order})
    value = record[key] if isinstance(record[key], str) else json.dumps(record[key])
    question = rng.choice(("Read {key} from {record}", "{record} What is {key}?", "{record}\n{key}?"))
    return question.format(key=key, record=json.dumps(record)), str(value)


# logs ----------------------------------------------------------------------------------------------------------------

_GAUGES = ("temp", "rpm", "volt", "amp", "bar", "flow", "load", "hz")


def _log_fields(rng: random.Random) -> dict[str, str]:
    gauges = rng.sample(_GAUGES, 2)
    return {
        "ts": f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}:{rng.randint(0, 59):02d}",
        "level": rng.choice(("info", "warn", "error", "debug")),
        "unit": asset_id(rng),
        **({"host": f"{rng.choice(SITES)}"} if rng.random() < 0.4 else {}),
        **{gauge: str(rng.randint(0, 999)) for gauge in gauges},
        "event": rng.choice(("start", "stop", "trip", "reset", "alarm", "sync", "poll", "ack")),
    }


def _log_line(fields: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in fields.items())


def logs_text(rng: random.Random) -> str:
    fields = _log_fields(rng)
    lines = [_log_line(fields)]
    for _ in range(rng.randint(1, 2)):  # the same unit speaks again
        lines.append(_log_line(_log_fields(rng) | {"unit": fields["unit"]}))
    return "\n".join(lines)


def logs_turn(rng: random.Random) -> Turn:
    fields = _log_fields(rng)
    keys = rng.sample(tuple(fields), rng.randint(1, 2))
    question = rng.choice(("{line}\nget {keys}", "get {keys} of {line}"))
    answer = " ".join(f"{key}={fields[key]}" for key in keys)
    return question.format(line=_log_line(fields), keys=" ".join(keys)), answer


# reports -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """The facts of one finished job, which a report states and restates."""

    asset: str
    site: str
    person: str
    part: str
    liquid: str
    symptom: str
    urgency: str
    time: str

    @property
    def machine(self) -> str:
        return EQUIPMENT[self.asset[:3]]


def _work(rng: random.Random) -> _Work:
    part, liquid = rng.choice(PARTS), rng.choice(LIQUIDS)
    symptom = rng.choice(rng.choice(tuple(FAULTS.values()))).format(part=part, liquid=liquid)
    urgency = rng.choice(rng.choice(tuple(URGENCIES.values())))
    return _Work(
        asset_id(rng), rng.choice(SITES), rng.choice(PEOPLE), part, liquid, symptom, urgency, rng.choice(TIMES)
    )


_OPENINGS = (
    "{w.person} inspected the {w.machine} {w.asset} at the {w.site} plant.",
    "At {w.site} the {w.part} of {w.asset} was worn; {w.person} replaced it.",
    "Work order closed: {w.asset}, {w.site}, done by {w.person}.",
    "{w.asset} ({w.machine}, {w.site}) was checked and needed {w.liquid}.",
    "Visit to {w.site}. Unit {w.asset}: new {w.part} fitted.",
    "The {w.machine} in {w.site} with tag {w.asset} lost {w.liquid} and was repaired by {w.person}.",
    "Crew {w.person} went to the {w.site} hall, changed the {w.part} on {w.asset} and cleaned the floor.",
)
_SYMPTOM_NOTES = (
    "The note said: it {w.symptom}.",
    "A {w.machine} that {w.symptom} must be looked at.",
    "Nobody can say why it {w.symptom}.",
    "Once more it {w.symptom}.",
)
_RESTATEMENTS = (
    "{w.asset} is back in service.",
    "The {w.machine} {w.asset} will be checked again {w.time}.",
    "Thanks to {w.person}, {w.asset} runs well at {w.site}.",
    "Summary: asset {w.asset}, site {w.site}, part {w.part}.",
    "{w.site} signed off {w.asset}.",
    "Note for {w.site}: order one {w.part} {w.time}.",
    "No {w.liquid} was lost and the {w.part} of {w.asset} is new.",
    "The manager wrote: {w.urgency}",
    "The old sign read: {w.urgency}",
)
_REPORT_QUESTIONS = (
    ("Which asset?", "{w.asset}"),
    ("Which asset was it?", "{w.asset}"),
    ("Tag?", "{w.asset}"),
    ("Which site?", "{w.site}"),
    ("Where was it?", "{w.site}"),
    ("Asset and site?", "{w.asset}, {w.site}"),
    ("Site and asset?", "{w.site}, {w.asset}"),
    ("What kind of machine?", "{w.machine}"),
)


def reports_text(rng: random.Random) -> str:
    work = _work(rng)
    sentences = [rng.choice(_OPENINGS), rng.choice(_SYMPTOM_NOTES), *rng.sample(_RESTATEMENTS, rng.randint(2, 3))]
    return " ".join(sentence.format(w=work) for sentence in sentences)


def reports_turn(rng: random.Random) -> Turn:
    work = _work(rng)
    report = rng.choice(_OPENINGS).format(w=work)
    if rng.random() < 0.5:
        aside = rng.choice((*_SYMPTOM_NOTES, "The manager wrote: {w.urgency}", "The crew left at noon.")).format(w=work)
        report = f"{aside} {report}" if rng.random() < 0.5 else f"{report} {aside}"
    question, answer = rng.choice(_REPORT_QUESTIONS)
    return rng.choice((f"{report} {question}", f"{question} {report}")), answer.format(w=work)


# copying -------------------------------------------------------------------------------------------------------------

_COPY_WORDS = (*SITES, *PEOPLE, *PARTS, *LIQUIDS, *ANIMALS, *THINGS, *PLACES, *EQUIPMENT.values())


def _item(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        return asset_id(rng)
    if kind < 0.6:
        return _code_word(rng)
    return rng.choice(_COPY_WORDS) if kind < 0.85 else str(rng.randint(0, 9999))


def copying_text(rng: random.Random) -> str:
    if rng.random() < 0.5:  # the list, then the list again
        separator = rng.choice((" ", ", ", " | "))
        line = separator.join(_item(rng) for _ in range(rng.randint(3, 8)))
        return f"{line}\n{line}"
    keys = rng.sample("abcdefghijklmnopqrstuvwxyz", rng.randint(3, 6))
    table = {key: _item(rng) for key in keys}
    asked = rng.sample(keys, 3)
    return "; ".join(f"{key}={value}" for key, value in table.items()) + "".join(f"; {k}? {table[k]}" for k in asked)


def copying_turn(rng: random.Random) -> Turn:
    items = [_item(rng) for _ in range(rng.randint(2, 6))]
    line = rng.choice((", ", " ")).join(items)
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(("Repeat: {}", "Say exactly: {}", "Echo {}", "{}\nAgain, please.")).format(line), line
    if kind < 0.75:
        return f"Last of: {', '.join(items)}", items[-1]
    word = rng.choice(LETTERS)
    return f"Put {word} before each of {', '.join(items)}", ", ".join(f"{word} {item}" for item in items)
