"""Rows chosen by how hard they are for the base: the easiest are left out, and if wanted the hopeless ones.

    studio data score RECIPE    the loss of every row, once (studio/scoring.py); kept in the user's cache
    selected(recipe, rows, …)   the rows that a recipe keeps and those that it drops, by these scores

A row's score is the base's mean cross-entropy a token of its answer, in nats. Leaving out what a model finds easy pays
where there is data enough (Sorscher et al., arXiv 2206.14486); rows of the largest loss are often broken, and keeping
the middle did best in pretraining (Marion et al., arXiv 2309.04564). The share is taken of each source by itself:
sources differ in how well any row of theirs can be predicted, and one share over all would drop the orderly ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from studio.data.rows import Place, Row
from studio.errors import ProfileError
from studio.job_files import read_json, to_json, write_atomic

if TYPE_CHECKING:
    from studio.recipe import Recipe

VERSION = 1
EASIEST_SHARE = 0.5
"""What `studio data score` shows as dropped where the recipe drops nothing yet."""

Why = Literal["easiest", "hardest", ""]


@dataclass(frozen=True)
class Scored:
    """A row with its score in nats a token; `why` it is dropped, or ""."""

    row: Row
    score: float
    why: Why = ""


def scored(recipe: Recipe, sources: Sequence[Sequence[Row]], rows: Sequence[Row]) -> list[Scored]:
    """The `rows` with the scores that were made before.

    Args:
        sources: all rows of each source, in their order; `rows` are some of them, the very same objects.

    Raises:
        ProfileError: there are no scores of this base and these data.
    """
    scores = find_scores(recipe)
    if scores is None or [len(of_source) for of_source in scores] != [len(source) for source in sources]:
        raise ProfileError(
            "data.drop_easiest and data.drop_hardest need the loss of every row on this base, which is not there: run "
            "studio data score RECIPE"
        )
    by_row = {
        id(row): score
        for source, of_source in zip(sources, scores, strict=True)
        for row, score in zip(source, of_source, strict=True)
    }
    return [Scored(row, by_row[id(row)]) for row in rows]


def choose(rows: Sequence[Scored], drop_easiest: float, drop_hardest: float) -> tuple[list[Scored], list[Scored]]:
    """(kept, dropped): of each source the shares with the least and with the largest score are dropped, rounded down.

    Of equal scores the earlier row is taken for the easier. A score that is not finite is dropped with the hardest
    where these are dropped at all.
    """
    why: dict[int, Why] = {}
    sources: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        sources.setdefault(row.row.source, []).append(number)
    for numbers in sources.values():
        order = sorted(
            numbers, key=lambda number: rows[number].score if math.isfinite(rows[number].score) else math.inf
        )
        easiest, hardest = int(drop_easiest * len(order)), int(drop_hardest * len(order))
        why.update(dict.fromkeys(order[:easiest], "easiest"))
        why.update(dict.fromkeys(order[len(order) - hardest :], "hardest"))
    kept = [row for number, row in enumerate(rows) if number not in why]
    return kept, [Scored(rows[n].row, rows[n].score, reason) for n, reason in sorted(why.items())]


# -------------------------------------------------------------------- the scores, kept


def find_scores(recipe: Recipe) -> list[list[float]] | None:
    """Scores of the rows of each source, in their order; None where there are none of this base and these data.

    Raises:
        DataError: the data cannot be read.
    """
    try:
        found = read_json(scores_path(recipe))
        return [[math.nan if value is None else float(value) for value in values] for values in found["scores"]]
    except (OSError, ValueError, KeyError, TypeError):  # none, or torn
        return None


def keep_scores(recipe: Recipe, scores: Sequence[Sequence[float]]) -> Path:
    """Writes the scores where `find_scores` looks for them."""
    path = scores_path(recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, to_json({"scores": scores}))
    return path


def scores_path(recipe: Recipe) -> Path:
    """Where the scores of this recipe's rows are kept: another base, other data or another cut make another path.

    They are of all rows of the sources, whatever is held out of them, dropped or weighted.
    """
    from adapters.fingerprint import sha256
    from adapters.packed_cache import default_cache_dir
    from studio.profile import base_fingerprint, data_digest

    data = recipe.data
    facts: list[Any] = [VERSION, data.max_length_tokens, recipe.training.method, data.format, data.columns]
    facts += [data.bad_rows, *(data_digest(source.path) for source in data.sources)]
    name = sha256(base_fingerprint(recipe).encode(), json.dumps(facts).encode())[:32]
    return default_cache_dir().with_name("scores") / f"{name}.json"


# -------------------------------------------------------------------- to look at


def write_rows(path: Path, rows: Sequence[Scored]) -> Path:
    """The rows as JSON Lines, the hardest first, each with its score, file, line and why it was dropped."""
    order = sorted(rows, key=lambda row: -row.score if math.isfinite(row.score) else -math.inf)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(f"{json.dumps(_shown(row), ensure_ascii=False)}\n" for row in order))
    return path


def _shown(scored_row: Scored) -> dict[str, Any]:
    row, place = scored_row.row, scored_row.row.place or Place("", 0)
    score = scored_row.score if math.isfinite(scored_row.score) else None
    said = {"score": score, **({"dropped": scored_row.why} if scored_row.why else {})}
    return {**said, "file": place.file, place.counted: place.line, "source": row.source, **row.as_row()}


def summary(kept: Sequence[Scored], dropped: Sequence[Scored]) -> list[dict[str, Any]]:
    """For each source its rows, how many are dropped and why, and the scores between which it is kept."""
    found: dict[str, dict[str, Any]] = {}
    for row in (*kept, *dropped):
        entry = found.setdefault(row.row.source, {"rows": 0, "easiest": 0, "hardest": 0, "kept": []})
        entry["rows"] += 1
        if row.why:
            entry[row.why] += 1
        else:
            entry["kept"].append(row.score)
    return [{"source": name, **entry, "kept": _between(entry["kept"])} for name, entry in found.items()]


def _between(scores: Iterable[float]) -> dict[str, float] | None:
    order = sorted(scores)
    return {"least": order[0], "median": order[len(order) // 2], "largest": order[-1]} if order else None
