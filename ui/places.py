"""Which recipes and jobs the browser can see, all by name: nothing outside the two folders is reachable from a page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import studio
from studio import Job, JobError, StudioError

RECIPES = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True)
class Source:
    """Where the text in the editor came from: a shipped recipe or the recipe of a job, and its name."""

    kind: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Source:
        """From "recipe:quickstart", as the list of sources has it.

        Raises:
            StudioError: another kind, or a name that could leave its folder.
        """
        kind, _, name = text.partition(":")
        if kind not in ("recipe", "job"):
            raise StudioError(f"received the source {text[:60]!r}; allowed: recipe:NAME or job:NAME")
        return cls(kind, checked_name(name))

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


@dataclass(frozen=True)
class Places:
    """The jobs root and the folder of the shipped recipes."""

    jobs_root: Path
    recipes_root: Path = RECIPES

    def job(self, name: str) -> Job:
        """The job of that name in the jobs root.

        Raises:
            StudioError: no such job, a damaged one, or a name that leads out of the root.
        """
        path = self.jobs_root / checked_name(name)
        if not path.is_dir():
            raise JobError(f'There is no job "{name}" in {self.jobs_root}')
        if path.resolve().parent != self.jobs_root.resolve():
            raise JobError(f'"{name}" leads out of {self.jobs_root}')
        return studio.open_job(path)

    def jobs(self) -> list[Job]:
        """Newest first."""
        return studio.list_jobs(self.jobs_root)

    @property
    def exports_root(self) -> Path:
        """Where exports go: the folder `exports` beside the jobs root, so that a job can be replaced without them."""
        return self.jobs_root.parent / "exports"

    def export(self, name: str) -> Path:
        """The folder of the export of that name.

        Raises:
            StudioError: no such export, or a name that leads out of the folder of the exports.
        """
        path = self.exports_root / checked_name(name)
        if not path.is_dir() or path.resolve().parent != self.exports_root.resolve():
            raise StudioError(f'There is no export "{name}" in {self.exports_root}')
        return path

    def free_export(self, wanted: str) -> str:
        """`wanted`, or the first of wanted-2, wanted-3, … that no export has yet."""
        return _free(self.exports_root, wanted)

    def sources(self) -> list[tuple[str, str]]:
        """(label, source) of every recipe that can be opened: the shipped ones, then those of the jobs."""
        names = sorted((path.stem for path in self.recipes_root.glob("*.yaml")), key=lambda n: (n != "quickstart", n))
        shipped = [(name, f"recipe:{name}") for name in names]
        return shipped + [(f"{job.name} (job)", f"job:{job.name}") for job in self.jobs()]

    def file_of(self, source: Source) -> Path:
        """The YAML file of a source; relative data paths in the editor start at its folder."""
        if source.kind == "job":
            return self.jobs_root / source.name / "recipe.yaml"
        return self.recipes_root / f"{source.name}.yaml"

    def text_of(self, source: Source) -> str:
        """The YAML text of a source.

        Raises:
            StudioError: it cannot be read.
        """
        if source.kind == "job":
            self.job(source.name)
        try:
            return self.file_of(source).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            raise StudioError(f'The recipe "{source.name}" cannot be read in {self.file_of(source).parent}') from None

    def free_name(self, wanted: str) -> str:
        """`wanted`, or the first of wanted-2, wanted-3, … that nothing in the jobs root has yet."""
        return _free(self.jobs_root, wanted)

    def output_dir(self, name: str) -> str:
        """The job directory of that name as a recipe says it: relative where it lies under the working directory."""
        path = self.jobs_root / name
        return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _free(folder: Path, wanted: str) -> str:
    stem, count, name = re.sub(r"-\d+$", "", wanted), 1, wanted
    while (folder / name).exists():
        count += 1
        name = f"{stem}-{count}"
    return name


def checked_name(name: str) -> str:
    """`name`, if it names one entry of one folder.

    Raises:
        StudioError: it is empty, hidden, or holds a path separator or a control character.
    """
    if not name or name.startswith(".") or any(c in "/\\" or not c.isprintable() for c in name) or len(name) > 200:
        raise StudioError(
            f"received the name {name[:60]!r}; allowed: a name without / and \\ that does not start with a dot"
        )
    return name
