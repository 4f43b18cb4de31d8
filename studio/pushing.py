"""`push`: an export → a repository on a hub, by the hub's own client. No torch.

Private unless asked otherwise. The token is the client's affair: it is read from where `hf auth login` or HF_TOKEN put
it, and neither shown nor written here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from adapters.errors import listed
from adapters.verify.run import check_plain_files
from studio.certificate import CERTIFICATE, FAILED, UNVERIFIED, Certificate, changed_files, read_certificate
from studio.errors import ExportError
from studio.licence import Licence, read_licence

PLACE = re.compile(r"(?<![\w.:/~)>-])/[\w.+@-]+(?:/[\w.+@-]+)+")
HOMES = tuple(f"/{name}/" for name in ("home", "Users", "root"))
SYSTEM = ("/usr/", "/bin/", "/dev/", "/etc/", "/proc/", "/sys/")
"""What every machine has, as in the first line of a script."""

TEXTS = (".json", ".md", ".txt", ".py", ".yaml", ".yml", "")
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def push(
    directory: Path | str,
    repository: str,
    *,
    public: bool = False,
    dry_run: bool = False,
    endpoint: str | None = None,
) -> dict[str, Any]:
    """Uploads an export, in one commit.

    Args:
        directory: what `studio export` wrote.
        repository: "owner/name" on the hub; made if it is not there.
        public: let everyone see it.
        dry_run: check everything that can be checked here, and reach no network.
        endpoint: of another hub than the client's own.

    Returns:
        {"repository", "private", "files", "bytes", "licence", "verdict", "dry_run", "url"}; url is "" in a dry run.

    Raises:
        ExportError: the export is not as it was certified, or failed, or was not verified; the licence asks for another
            name; the repository is public already; the hub refuses, or cannot be reached.
    """
    folder = Path(directory)
    certificate = read_certificate(folder)
    licence = _checked(folder, certificate, repository)
    report = {
        "repository": repository,
        "private": not public,
        "files": sorted([*certificate.files, CERTIFICATE]),
        "bytes": sum(int(file["bytes"]) for file in certificate.files.values()) + (folder / CERTIFICATE).stat().st_size,
        "licence": licence.name,
        "verdict": certificate.verdict,
        "dry_run": dry_run,
        "url": "",
    }
    return report if dry_run else {**report, "url": _upload(folder, repository, public, report["files"], endpoint)}


def _checked(folder: Path, certificate: Certificate, repository: str) -> Licence:
    """Everything that can be told without the hub; returns the licence that the export carries."""
    if not REPOSITORY.fullmatch(repository):
        raise ExportError(f"repository {repository!r}: expected owner/name, letters, digits, '-', '_' and '.'")
    if certificate.verdict in (FAILED, UNVERIFIED):
        raise ExportError(f"{folder} is {certificate.verdict}: export it again, with verification, before it is shared")
    plain = check_plain_files(folder)
    if plain.status == "failed":
        raise ExportError(f"{folder} is not to be uploaded as it is: {plain.detail}")
    if changed := changed_files(folder, certificate):
        raise ExportError(listed(f"{folder} is not as it was certified; export it again", changed))
    if told := _places(folder, certificate):
        raise ExportError(listed(f"{folder} names places on this machine; export it again", told))
    licence = read_licence(folder, str(certificate.base["name"]))
    licence.check_name(repository.partition("/")[2])
    licence.check_files()
    return licence


def _places(folder: Path, certificate: Certificate) -> list[str]:
    """Paths of this machine in the files that go to others, one line each; vocabularies hold what looks like them."""
    found = []
    for name in (*certificate.files, CERTIFICATE):
        if Path(name).suffix in TEXTS and Path(name).name not in VOCABULARIES:
            words = PLACE.findall((folder / name).read_text(encoding="utf-8", errors="replace"))
            found += [f"{name}: {word}" for word in dict.fromkeys(words) if _is_here(word)]
    return found


def _is_here(word: str) -> bool:
    if word.startswith(HOMES):
        return True
    try:
        return not word.startswith(SYSTEM) and Path(word).exists()
    except OSError:
        return False


def _upload(folder: Path, repository: str, public: bool, files: Any, endpoint: str | None) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    # errors of the HTTP library too, which is not the same in every version of the client
    refusals: tuple[Any, ...] = (*HfHubHTTPError.__bases__, HFValidationError)
    api = HfApi(endpoint=endpoint)
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.repo_info(repository).private:
            raise ExportError(
                f"{repository} is there already and everyone can see it; choose another name, or say --public"
            )
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(files),
            commit_message=f"{folder.name}, as certified",
        )
    except LocalTokenNotFoundError:
        raise ExportError("the hub wants to know who you are: run `hf auth login`, or set HF_TOKEN") from None
    except OfflineModeIsEnabled:
        raise ExportError("the hub is switched off (HF_HUB_OFFLINE); unset it, or see --dry-run") from None
    except refusals as error:
        raise ExportError(f"the hub did not take {repository}: {error}") from None
    return str(done.commit_url)
