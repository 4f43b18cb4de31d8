"""The card of an export: README.md, and the licence that goes along. No torch.

What it says comes from the job's own files, the base's folder and the checks; where they say nothing, nothing is said.
Paths of the machine that made it are left out.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from adapters.export import EXPORTERS, Source
from adapters.verify import Check
from studio.certificate import CERTIFICATE, verdict
from studio.data import Row
from studio.data.files import data_sha256
from studio.errors import DataError, JobError, ProfileError
from studio.jobs import Job, open_job
from studio.licence import Licence
from studio.progress import gate_text, metric_rows
from studio.quantities import as_percent
from studio.recipe import Recipe, recipe_to_yaml

CARD, PICTURE = "README.md", "placement.png"
PICTURES = ("rank.png", "delta.png", "use.png")
"""Of a job's pictures the first of these that is there shows the placement."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SIGNS = {"passed": "passed", "failed": "**failed**", "not run": "not run"}


def write_card(
    directory: Path,
    *,
    source: Source,
    base_name: str,
    licence: Licence,
    format: str,
    checks: Sequence[Check],
    run: str = "",
    consumer: str = "",
    job: Path | None = None,
    prompts_from: str = "",
) -> Path:
    """Writes README.md, the placement's picture, the licence files of the base and the notice that they ask for.

    Args:
        base_name: a hub id, "embedded" or the base's name; never a path.
        licence: of the base, by `studio.licence.read_licence`.
        run: the command, or the few lines, with which the consumer runs the export.
        consumer: the program that it is for, as people call it.
        job: the job directory that trained the adapter, for metrics, recipe, data and picture.

    Raises:
        ExportError: the licence asks for another name, or for a copy of it that the base's folder does not have.
    """
    licence.check_name(source.name)
    licence.carry(directory)
    trained = _job(job)
    sections = [
        _front(source, base_name, licence, format),
        f"# {source.name}",
        _opening(source, base_name, licence, format, consumer),
        _section("How to run", f"```\n{run.strip()}\n```" if run else ""),
        *(_of_job(trained, directory) if trained else []),
        _section("Verification", _verification(checks, prompts_from)),
        _section("Licence", _licence(licence, base_name)),
    ]
    file = directory / CARD
    file.write_text("\n\n".join(part for part in sections if part) + "\n", encoding="utf-8")
    file.chmod(0o644)
    return file


def public_name(base: str | Path) -> str:
    """What a card calls a base: a hub id and "embedded" as they are, a folder by its name."""
    text = str(base)
    if text == "embedded" or (HUB_ID.fullmatch(text) and not Path(text).is_dir()):
        return text
    return Path(text).absolute().name


def _job(job: Path | None) -> Job | None:
    try:
        return open_job(job) if job else None
    except JobError:
        return None


def _front(source: Source, base_name: str, licence: Licence, format: str) -> str:
    fields: dict[str, Any] = dict(licence.fields)
    if licence.llama and not fields:
        link = next(file.name for file in licence.files if "licen" in file.name.casefold())
        fields = {"license": "other", "license_name": f"llama{licence.llama.version}", "license_link": link}
    if HUB_ID.fullmatch(base_name):
        fields["base_model"] = base_name
    fields["library_name"] = {"gguf": "gguf"}.get(
        format, "peft" if EXPORTERS[format].kind == "adapter" else "transformers"
    )
    fields |= {"pipeline_tag": "text-generation", "tags": ["moe-studio", *(["lora"] if source.adapter else [])]}
    text = StringIO()
    YAML().dump(fields, text)
    return f"---\n{text.getvalue()}---"


def _opening(source: Source, base_name: str, licence: Licence, format: str, consumer: str) -> str:
    kind = EXPORTERS[format]
    what = "An adapter for" if kind.kind == "adapter" else "A fine-tune of" if source.adapter else "An export of"
    base = "the embedded base of MoE Studio" if base_name == "embedded" else f"`{base_name}`"
    lines = [f"{what} {base}, written by MoE Studio{f' for {consumer}' if consumer else ''} ({kind.title})."]
    if licence.llama and licence.llama.built_with:
        lines.append(f"**{licence.llama.built_with}**")
    return "\n\n".join(lines)


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


# -------------------------------------------------------------------- of the job


def _of_job(job: Job, directory: Path) -> list[str]:
    recipe = job.recipe()
    return [
        _section("Before and after", _metrics(job.result())),
        _section("Training data", _data(recipe)),
        _section("Where the adapters are", _picture(job, directory)),
        _section("Recipe", f"```yaml\n{without_paths(recipe_to_yaml(recipe), recipe).strip()}\n```"),
    ]


def _metrics(result: Mapping[str, Any] | None) -> str:
    before, after = (result or {}).get("before"), (result or {}).get("after")
    if not before or not after:
        return "No held-out data was given, so nothing was measured."
    start = (result or {}).get("start")
    sides = ["base", *(["start"] if start else []), "tuned"]
    rows = [
        f"| {_cell(row.title)} | "
        + " | ".join(f"{getattr(row, side)} ({getattr(row, f'{side}_interval')})".replace(" ()", "") for side in sides)
        + " |"
        for row in metric_rows(before, after, result.get("change") if result else None, start)
    ]
    count = after.get("examples")
    on = f"On {count} held-out examples" if count else "On the tasks named here"
    head = f"{on}, with the adapter on the base as training held it; in brackets intervals of 95 %:"
    gate = [
        f"- gate {'passed' if entry['passed'] else '**failed**'}: {_cell(gate_text(entry))}"
        for entry in (result or {}).get("gate") or []
    ]
    columns = f"| | {' | '.join(sides)} |", f"|---|{'---|' * len(sides)}"
    return "\n".join([head, "", *columns, *rows, *([""] if gate else []), *gate])


def _data(recipe: Recipe) -> str:
    from studio.data import held_out_rows, training_rows

    lines = []
    uses: list[tuple[str, Path, Callable[[Recipe], list[Row]], str | None]] = [
        ("training", source.path, training_rows, source.label) for source in recipe.data.sources
    ]
    if recipe.data.eval is not None:
        uses.append(("held out", recipe.data.eval, held_out_rows, None))
    for use, file, read, source in uses:
        try:
            rows = read(recipe)
        except (DataError, ProfileError):
            lines.append(f"- {use}: `{file.name}`, which is not there any more")
            continue
        own = [row for row in rows if source is None or not recipe.data.mixed or row.source == source]
        sources = ", ".join(sorted({row.source for row in own}))
        first = "the first " if recipe.data.streaming and use == "training" else ""
        digest = data_sha256(file)
        lines.append(f"- {use}: `{file.name}`, {first}{len(own):,} examples, sources: {sources}, sha256 `{digest}`")
    if recipe.data.eval_fraction is not None:
        lines.append(f"- held out: {as_percent(recipe.data.eval_fraction)} of the rows of the training files")
    return "\n".join(lines)


def _picture(job: Job, directory: Path) -> str:
    found = next((job.path / "pictures" / name for name in PICTURES if (job.path / "pictures" / name).is_file()), None)
    if found is None:
        return ""
    shutil.copyfile(found, directory / PICTURE)
    (directory / PICTURE).chmod(0o644)
    titles = {"rank": "LoRA rank", "delta": "how far training moved each expert", "use": "where the data goes"}
    return f"![By layer and expert: {titles[found.stem]}]({PICTURE})"


def without_paths(text: str, recipe: Recipe) -> str:
    """A recipe's YAML in which files and folders of this machine have their last name alone."""
    paths = [
        *(source.path for source in recipe.data.sources),
        recipe.data.eval,
        recipe.output.dir,
        recipe.evaluation.json_schema,
    ]
    paths += [Path(task) for task in recipe.evaluation.tasks if Path(task).is_absolute()]
    base = Path(recipe.model.base)
    for path in [path for path in (*paths, base if base.is_absolute() else None) if path is not None]:
        text = text.replace(str(path), Path(path).name)
    return text


# -------------------------------------------------------------------- checks and licence


def _verification(checks: Sequence[Check], prompts_from: str) -> str:
    rows = [f"| {check.name} | {SIGNS[check.status]} | {_cell(check.detail)} |" for check in checks]
    asked = f" Prompts: {prompts_from}." if prompts_from else ""
    head = f"**{verdict(checks).capitalize()}.** All numbers, and the sha256 of every file: `{CERTIFICATE}`.{asked}"
    return "\n".join([head, "", "| check | | found |", "|---|---|---|", *rows])


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")


def _licence(licence: Licence, base_name: str) -> str:
    if licence.llama:
        return _llama(licence)
    if not licence.name:
        return (
            f"`{base_name}` names no licence in its folder, so none is named here. Find out under which terms the base "
            "was published before you pass this model on."
        )
    files = ", ".join(f"`{file.name}`" for file in licence.files)
    carried = (
        f"its files go along: {files}" if files else "its folder holds no copy of the text, so none goes along here"
    )
    return f"The base is under `{licence.name}`; {carried}. What is made from it is subject to the same terms."


def _llama(licence: Licence) -> str:
    terms = licence.llama
    assert terms is not None
    lines = [
        terms.notice,
        f"This model is made from {licence.base_name} and is subject to the {licence.name}, a copy of which goes "
        f"along, and to the acceptable use policy that it refers to: {terms.policy}.",
        f"The {licence.name} asks licensees whose products or services had more than 700 million monthly active users "
        "in the calendar month before the version's release to request a separate licence from Meta.",
    ]
    if terms.multimodal_eu:
        lines.append(
            f"The acceptable use policy of Llama {terms.version} grants no rights in its multimodal models to "
            "individuals domiciled in the European Union, or companies with their principal place of business there; "
            "end users of products that incorporate them are not affected."
        )
    return "\n\n".join(lines)
