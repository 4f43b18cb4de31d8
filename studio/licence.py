"""The licence of a base model, and what it asks of a model made from it. No torch.

    read_licence(base, name) ─▶ Licence ── check_name(name)      before anything is written
                                        ── carry(directory)     copies, and the notice

A licence is read from the base's own folder: its licence files and the front matter of its card. None is assumed: where
the base says nothing, the card says that it says nothing.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from studio.errors import ExportError

CARDS = ("README.md", "MODEL_CARD.md")
CARRIED = re.compile(r"(licen[cs]e|notice|copying|use[_-]?policy|acceptable[_-]?use)", re.IGNORECASE)
MOST_BYTES = 1_000_000
LLAMA = re.compile(r"llama[ -]?(\d(?:\.\d)?)\b", re.IGNORECASE)
LLAMA_TEXT = re.compile(r"LLAMA (\d(?:\.\d)?) COMMUNITY LICENSE", re.IGNORECASE)
NOTICE = "NOTICE"


@dataclass(frozen=True)
class LlamaTerms:
    """What a version of the Llama Community License asks of who passes a derivative on (its section 1.b and 2).

    Attributes:
        notice: the attribution that must stand in a "Notice" text file.
        built_with: what must be displayed, "" where nothing is asked.
        prefix: with what the derivative's name must begin, "" where nothing is asked.
        multimodal_eu: the acceptable use policy grants no rights in multimodal models to those domiciled in the EU.
    """

    version: str
    notice: str
    built_with: str = "Built with Llama"
    prefix: str = "Llama"
    multimodal_eu: bool = False

    @property
    def policy(self) -> str:
        """Where the acceptable use policy is published."""
        place = "llama-2" if self.version == "2" else f"llama{self.version.replace('.', '_')}"
        return f"https://www.llama.com/{place}/use-policy"


def _terms(version: str) -> LlamaTerms:
    if version == "2":
        rights = "Copyright (c) Meta Platforms, Inc. All Rights Reserved."
        return LlamaTerms(version, f"Llama 2 is licensed under the LLAMA 2 Community License, {rights}", "", "")
    rights = "Copyright © Meta Platforms, Inc. All Rights Reserved."
    if version == "3":
        notice = f"Meta Llama 3 is licensed under the Meta Llama 3 Community License, {rights}"
        return LlamaTerms(version, notice, "Built with Meta Llama 3", "Llama 3")
    notice = f"Llama {version} is licensed under the Llama {version} Community License, {rights}"
    return LlamaTerms(version, notice, multimodal_eu=version in ("3.2", "4"))


@dataclass(frozen=True)
class Licence:
    """A base's licence.

    Attributes:
        fields: `license`, `license_name`, `license_link` as the base's card has them; may be empty.
        files: licence, notice and policy files in the base's folder.
        llama: the terms, where it is a Llama Community License.
    """

    base_name: str
    fields: Mapping[str, Any]
    files: tuple[Path, ...]
    llama: LlamaTerms | None = None

    @property
    def name(self) -> str:
        """For people; "" where the base names none."""
        if self.llama:
            return f"Llama {self.llama.version} Community License"
        link = str(self.fields.get("license_name") or "") if self.fields.get("license") == "other" else ""
        return link or str(self.fields.get("license") or "")

    def check_name(self, *names: str) -> None:
        """Refuses names (of the model, of its folder, of a repository) that the licence does not allow.

        Raises:
            ExportError: with a name that would do.
        """
        prefix = self.llama.prefix if self.llama else ""
        for name in names:
            if not name.casefold().startswith(prefix.casefold()) and not _spelled(name, prefix):
                raise ExportError(
                    f"{name!r}: the {self.name} of {self.base_name} asks that the name of a model made from it begins "
                    f"with {prefix!r}; for instance {prefix.replace(' ', '-')}-{name}"
                )

    def check_files(self) -> None:
        """Refuses a Llama-licensed base whose folder has no copy of the licence to pass on.

        Raises:
            ExportError
        """
        if self.llama and not any("licen" in file.name.casefold() for file in self.files):
            raise ExportError(
                f"{self.base_name} is under the {self.name}, which asks that a copy of it goes along with every "
                "export, and the base's folder has none; put the LICENSE file there that came with the model, or with "
                "Meta's own"
            )

    def carry(self, directory: Path) -> list[str]:
        """Copies the base's licence files to `directory` and adds the notice that a Llama licence asks for.

        Returns:
            The names of the files written.

        Raises:
            ExportError: as `check_files`.
        """
        self.check_files()
        for file in self.files:
            shutil.copyfile(file, directory / file.name)
            (directory / file.name).chmod(0o644)
        names = [file.name for file in self.files]
        if self.llama and not _says(directory, names, self.llama.notice):
            with (directory / NOTICE).open("a", encoding="utf-8") as notice:
                notice.write(f"{self.llama.notice}\n")
            (directory / NOTICE).chmod(0o644)
            names += [] if NOTICE in names else [NOTICE]
        return names


def _spelled(name: str, prefix: str) -> bool:
    """Whether a folder's name begins with the prefix, a space in it written as a hyphen or underscore."""
    return re.sub(r"[-_]", " ", name).casefold().startswith(prefix.casefold())


def _says(directory: Path, names: list[str], notice: str) -> bool:
    notices = [directory / name for name in names if name.casefold().startswith("notice")]
    return any(notice in file.read_text(encoding="utf-8", errors="replace") for file in notices)


def read_licence(base: Path, base_name: str) -> Licence:
    """The licence of the base in the folder `base`, called `base_name` (a hub id, a folder's name, "embedded")."""
    files = tuple(
        path
        for path in sorted(base.iterdir())
        if path.is_file() and CARRIED.match(path.name) and path.stat().st_size < MOST_BYTES
    )
    fields = _front_matter(base)
    return Licence(base_name, fields, files, _llama(fields, files, base_name))


def _llama(fields: Mapping[str, Any], files: tuple[Path, ...], base_name: str) -> LlamaTerms | None:
    """By the card's fields; else by the text of the licence; else by the publisher, for a folder without either."""
    named = [str(fields.get(key) or "") for key in ("license", "license_name")]
    for text in named:
        if found := LLAMA.match(text):
            return _terms(found[1])
    for file in files:
        if found := LLAMA_TEXT.search(file.read_text(encoding="utf-8", errors="replace")[:2000]):
            return _terms(found[1])
    if not any(named) and base_name.startswith("meta-llama/") and (found := LLAMA.search(base_name)):
        return _terms(found[1])
    return None


def _front_matter(base: Path) -> dict[str, Any]:
    """`license`, `license_name` and `license_link` of the base's card."""
    for name in CARDS:
        file = base / name
        parts = file.read_text(encoding="utf-8", errors="replace").split("---\n", 2) if file.is_file() else []
        if len(parts) == 3 and not parts[0].strip():
            try:
                found = YAML(typ="safe").load(parts[1])
            except YAMLError:
                continue
            if isinstance(found, dict):
                return {key: found[key] for key in ("license", "license_name", "license_link") if found.get(key)}
    return {}
