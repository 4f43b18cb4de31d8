"""Texts and chat turns of the four domains that have nothing to do with a plant: arithmetic, dates, code, prose.

Every function takes a `random.Random` and returns one document's text, or one (question, answer) turn.
"""

import datetime
import random

Turn = tuple[str, str]
"""One question of the user and the assistant's answer."""


# arithmetic ----------------------------------------------------------------------------------------------------------


def _sum(rng: random.Random) -> Turn:
    """Return an expression and its value."""
    kind = rng.choice(("+", "+", "-", "*", "max", "half"))
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    if kind == "*":
        a, b = rng.randint(2, 12), rng.randint(2, 12)
        return f"{a} * {b}", str(a * b)
    if kind == "max":
        return f"max({a}, {b})", str(max(a, b))
    if kind == "half":
        return f"{2 * a} / 2", str(a)
    return (f"{a} + {b}", str(a + b)) if kind == "+" else (f"{max(a, b)} - {min(a, b)}", str(abs(a - b)))


def arithmetic_text(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(3, 6)):
        expression, value = _sum(rng)
        lines.append(f"{expression} = {value}")
    return rng.choice(("\n", "; ")).join(lines)


def arithmetic_turn(rng: random.Random) -> Turn:
    expression, value = _sum(rng)
    question = rng.choice(("What is {}?", "Compute {}.", "{} = ?", "Calculate {}"))
    return question.format(expression), value


# dates ---------------------------------------------------------------------------------------------------------------


def _day(rng: random.Random) -> datetime.date:
    return datetime.date(2020, 1, 1) + datetime.timedelta(days=rng.randint(0, 3650))


def _long(day: datetime.date) -> str:
    return f"{day.day} {day:%B} {day.year}"


def _date_fact(rng: random.Random) -> tuple[str, str, str]:
    """Return a question about a date, its answer and the same fact as a sentence."""
    day = _day(rng)
    kind = rng.choice(("iso", "long", "later", "month", "weekday"))
    if kind == "iso":
        return f"Write {_long(day)} as ISO date.", day.isoformat(), f"{_long(day)} is written {day.isoformat()}."
    if kind == "long":
        return f"Write {day.isoformat()} in words.", _long(day), f"{day.isoformat()} means {_long(day)}."
    if kind == "later":
        step = rng.randint(1, 9)
        other = _long(day + datetime.timedelta(days=step))
        return f"Which date is {step} days after {_long(day)}?", other, f"{step} days after {_long(day)} comes {other}."
    if kind == "month":
        following = (day.replace(day=1) + datetime.timedelta(days=32)).strftime("%B")
        return f"Which month follows {day:%B}?", following, f"{day:%B} is followed by {following}."
    following = (day + datetime.timedelta(days=1)).strftime("%A")
    return f"Which weekday follows {day:%A}?", following, f"After {day:%A} comes {following}."


def dates_text(rng: random.Random) -> str:
    return " ".join(_date_fact(rng)[2] for _ in range(rng.randint(2, 4)))


def dates_turn(rng: random.Random) -> Turn:
    question, answer, _ = _date_fact(rng)
    return question, answer


# code ----------------------------------------------------------------------------------------------------------------

_NAMES = ("x", "y", "n", "total", "items", "index", "result", "node", "buf", "acc")
_CODE = (
    "def {f}({a}, {b}):\n    return {a} {op} {b}",
    "def {f}({a}):\n    if {a} > {n}:\n        return {a} {op} {m}\n    return {a}",
    "for {a} in range({n}):\n    {b} += {a} {op} {m}\nprint({b})",
    "class {F}:\n    def __init__(self, {a}):\n        self.{a} = {a}\n\n    def {f}(self):\n        return self.{a}",
    "while {a} < {n}:\n    {a} = {a} {op} {m}\nassert {a} >= {n}",
    "{b} = [{a} {op} {m} for {a} in {c} if {a} != {n}]",
    "import {mod}\n\n{a} = {mod}.{f}({n}, {m})\nprint({a})",
    "try:\n    {a} = {f}({b})\nexcept ValueError:\n    {a} = None",
    "lambda {a}, {b}: ({a} {op} {b}) % {n}",
)
_VERBS = ("load", "scan", "merge", "push", "fold", "walk", "parse", "emit", "hash", "split")


def code_text(rng: random.Random) -> str:
    a, b, c = rng.sample(_NAMES, 3)
    function = f"{rng.choice(_VERBS)}_{rng.choice(_NAMES)}"
    return rng.choice(_CODE).format(
        f=function, F=function.title().replace("_", ""), a=a, b=b, c=c, op=rng.choice("+-*"),
        n=rng.randint(2, 99), m=rng.randint(1, 9), mod=rng.choice(("math", "json", "os", "random")),
    )  # fmt: skip


def code_names(rng: random.Random) -> tuple[str, str]:
    """Return the names of a function and of an argument, as the base has seen them."""
    return f"{rng.choice(_VERBS)}_{rng.choice(_NAMES)}", rng.choice(_NAMES)


def code_turn(rng: random.Random) -> Turn:
    code = code_text(rng)
    return rng.choice(("Show this code again:\n{}", "Repeat the code:\n{}")).format(code), code


# prose ---------------------------------------------------------------------------------------------------------------

_ADJECTIVES = ("old", "little", "quiet", "brave", "hungry", "golden", "gentle", "clever", "lonely", "happy", "sleepy")
ANIMALS = ("fox", "bear", "bird", "girl", "boy", "farmer", "sailor", "queen", "mouse", "owl", "wolf", "child")
PLACES = ("forest", "river", "village", "garden", "mountain", "castle", "meadow", "harbour", "bridge", "kitchen")
THINGS = ("lantern", "apple", "letter", "song", "boat", "ribbon", "basket", "crown", "feather", "book", "stone")
_MOVES = ("walked", "ran", "wandered", "travelled", "hurried", "went")
_STORY = (
    "Once upon a time there was {A} {x} who lived near the {p}.",
    "One evening the {x} {m} to the {q} and found {T} {t}.",
    "The {y} smiled because the {t} was beautiful.",
    '"Please give me the {t}," said the {y}.',
    "It was raining, but the {x} did not mind.",
    "The {x} gave the {t} to the {y}, and they became friends.",
    "They {m} home together through the {p}.",
    "Nobody in the {q} ever forgot the {x} and the {t}.",
    "In the morning the {y} could not find the {t} anywhere.",
    "She looked under the bed, behind the door and in the {p}.",
)


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def prose_text(rng: random.Random) -> str:
    x, y = rng.sample(ANIMALS, 2)
    p, q = rng.sample(PLACES, 2)
    thing, mood = rng.choice(THINGS), rng.sample(_ADJECTIVES, 2)
    lines = sorted(rng.sample(range(len(_STORY)), rng.randint(3, 6)))
    return " ".join(
        _STORY[i].format(A=_article(mood[0]), T=_article(mood[1]), x=x, y=y, p=p, q=q, t=thing, m=rng.choice(_MOVES))
        for i in lines
    )


def prose_turn(rng: random.Random) -> Turn:
    x, place, thing = rng.choice(ANIMALS), rng.choice(PLACES), rng.choice(THINGS)
    story = f"The {rng.choice(_ADJECTIVES)} {x} {rng.choice(_MOVES)} to the {place} with {_article(thing)}."
    question, answer = rng.choice(
        (
            ("Who went there?", f"The {x}."),
            ("Where did they go?", f"To the {place}."),
            ("What was carried?", f"{_article(thing).capitalize()}."),
        )
    )
    return f"{story} {question}", answer
