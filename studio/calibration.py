"""The examples from which the GGUF quantiser learns what matters: any data that a recipe can train on. No torch.

calibration(file, origin) ─▶ prompts                  refused before anything is written
handed_over(options, origin) ─▶ options               with the prompts in a file that the exporter reads
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

from adapters.export import IMPORTANCE_EXAMPLES, Options, is_importance_matrix
from adapters.verify.run import Prompt
from studio.data import Reading, Row, RowKind, iter_rows
from studio.data.files import is_hub
from studio.data.formats import KINDS
from studio.data.of_recipe import written_by_template
from studio.errors import DataError, ExportError, FileProblem, Problem
from studio.export_origin import Origin
from studio.held_out import lines_of, prompts_of
from studio.methods import METHODS

TEXTS = (".txt", ".md")


def calibration(file: Path, origin: Origin) -> tuple[Prompt, ...]:
    """The first examples in `file`, of text files a line each; read as the job read it where it trained on it.

    Raises:
        ExportError, DataError: it cannot be read, or holds nothing.
    """
    if file.suffix in TEXTS:
        return lines_of(file, IMPORTANCE_EXAMPLES)
    if not (is_hub(file) or file.exists()):
        raise ExportError(f"{file} does not exist; expected examples, in any file that data.train takes")
    found = prompts_of(list(islice(_rows(file, origin), IMPORTANCE_EXAMPLES)), IMPORTANCE_EXAMPLES)
    if not found:
        raise ExportError(f"{file} holds no examples of what a model should write")
    return found


def _rows(file: Path, origin: Origin) -> Iterator[Row]:
    kinds: tuple[RowKind, ...] = tuple(KINDS)
    reading, drop = Reading(written=written_by_template(str(origin.base))), False
    recipe = origin.job.recipe() if origin.job else None
    if recipe and file in [source.path for source in recipe.data.sources]:
        kinds, reading = METHODS[recipe.training.method].rows, Reading.of(recipe)
        drop = recipe.data.bad_rows == "drop"
    for found in iter_rows(file, kinds, reading):
        if not isinstance(found, Problem):
            yield found
        elif not drop or isinstance(found, FileProblem):
            raise DataError([found])


@contextmanager
def handed_over(options: Options, origin: Origin) -> Iterator[Options]:
    """The options with the examples of `options.importance` as JSON Lines of {"text"} or {"messages"}, for as long as
    the block runs; an importance matrix stays as it is.

    Raises:
        ExportError, DataError: as `calibration`.
    """
    if options.importance is None or is_importance_matrix(options.importance):
        yield options
        return
    prompts = calibration(options.importance, origin)
    rows = ({"text": each} if isinstance(each, str) else {"messages": list(each)} for each in prompts)
    with tempfile.TemporaryDirectory(prefix="calibration-") as folder:
        file = Path(folder) / "examples.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        yield replace(options, importance=file)
