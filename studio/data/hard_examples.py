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

from studio.data.placed import Placed, lines_of
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

    placed: Placed
    score: float
    why: Why = ""


def selected(
    recipe: Recipe, rows: Sequence[Placed], drop_easiest: float, drop_hardest: float
) -> tuple[list[Scored], list[Scored]]:
    """(kept, dropped), each in the order of `rows`, by the scores that were made before.

    Raises:
        ProfileError: there are none of this base and these data.
    """
    return choose(scored(recipe, rows), drop_easiest, drop_hardest)


def scored(recipe: Recipe, rows: Sequence[Placed]) -> list[Scored]:
    """The rows with the scores that were made before.

    Raises:
        ProfileError: there are none of this base and these data.
    """
    scores = find_scores(recipe)
    if scores is None:
        raise ProfileError(
            "data.drop_easiest and data.drop_hardest need the loss of every row on this base, which is not there: run "
            "studio data score RECIPE"
        )
    return [Scored(entry, scores[str(entry.file)][entry.number]) for entry in rows]


def choose(rows: Sequence[Scored], drop_easiest: float, drop_hardest: float) -> tuple[list[Scored], list[Scored]]:
    """(kept, dropped): of each source the shares with the least and with the largest score are dropped, rounded down.

    Of equal scores the earlier row is taken for the easier. A score that is not finite is dropped with the hardest
    where these are dropped at all.
    """
    why: dict[int, Why] = {}
    sources: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        sources.setdefault(row.placed.row.source, []).append(number)
    for numbers in sources.values():
        order = sorted(
            numbers, key=lambda number: rows[number].score if math.isfinite(rows[number].score) else math.inf
        )
        easiest, hardest = int(drop_easiest * len(order)), int(drop_hardest * len(order))
        why.update(dict.fromkeys(order[:easiest], "easiest"))
        why.update(dict.fromkeys(order[len(order) - hardest :], "hardest"))
    kept = [row for number, row in enumerate(rows) if number not in why]
    return kept, [Scored(rows[n].placed, rows[n].score, reason) for n, reason in sorted(why.items())]


# -------------------------------------------------------------------- the scores, kept


def find_scores(recipe: Recipe) -> dict[str, list[float]] | None:
    """Scores of the rows of each source's file, by its path; None where there are none of this base and these data.

    Raises:
        DataError: the data cannot be read.
    """
    path = scores_path(recipe)
    try:
        found = read_json(path)
        lists = [[math.nan if value is None else float(value) for value in values] for values in found["scores"]]
        by_file = {str(source.path): values for source, values in zip(recipe.data.sources, lists, strict=True)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, torn, or of another version
        return None
    return by_file if found.get("version") == VERSION else None


def keep_scores(recipe: Recipe, scores: dict[str, list[float]]) -> Path:
    """Writes the scores where `find_scores` looks for them."""
    path = scores_path(recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    in_order = [scores[str(source.path)] for source in recipe.data.sources]
    write_atomic(path, to_json({"version": VERSION, "scores": in_order}))
    return path


def scores_path(recipe: Recipe) -> Path:
    """Where the scores of this recipe's rows are kept: another base, other data or another cut make another path.

    They are of all rows of the sources, whatever is held out of them, dropped or weighted.
    """
    from adapters.fingerprint import sha256
    from adapters.packed_cache import default_cache_dir
    from studio.profile import base_fingerprint, file_digest

    facts: list[Any] = [VERSION, recipe.data.max_length_tokens, recipe.training.method]
    facts += [file_digest(source.path) for source in recipe.data.sources]
    name = sha256(base_fingerprint(recipe).encode(), json.dumps(facts).encode())[:32]
    return default_cache_dir().with_name("scores") / f"{name}.json"


# -------------------------------------------------------------------- to look at


def write_rows(path: Path, rows: Sequence[Scored]) -> Path:
    """The rows as JSON Lines, the hardest first, each with its score, file, line and why it was dropped."""
    lines = lines_of(row.placed for row in rows)
    order = sorted(rows, key=lambda row: -row.score if math.isfinite(row.score) else -math.inf)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(f"{json.dumps(_shown(row, lines), ensure_ascii=False)}\n" for row in order))
    return path


def _shown(row: Scored, lines: dict[tuple[Path, int], int]) -> dict[str, Any]:
    entry = row.placed
    said = {"score": row.score if math.isfinite(row.score) else None, **({"dropped": row.why} if row.why else {})}
    where = {"file": str(entry.file), "line": lines[entry.file, entry.number], "source": entry.row.source}
    return {**said, **where, **entry.row.as_row()}


def summary(kept: Sequence[Scored], dropped: Sequence[Scored]) -> list[dict[str, Any]]:
    """For each source its rows, how many are dropped and why, and the scores between which it is kept."""
    found: dict[str, dict[str, Any]] = {}
    for row in (*kept, *dropped):
        entry = found.setdefault(row.placed.row.source, {"rows": 0, "easiest": 0, "hardest": 0, "kept": []})
        entry["rows"] += 1
        if row.why:
            entry[row.why] += 1
        else:
            entry["kept"].append(row.score)
    return [{"source": name, **entry, "kept": _between(entry["kept"])} for name, entry in found.items()]


def _between(scores: Iterable[float]) -> dict[str, float] | None:
    order = sorted(scores)
    return {"least": order[0], "median": order[len(order) // 2], "largest": order[-1]} if order else None
