"""What an export is made from: the base and the adapter that a job, an adapter or a model stands for. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.checkpoint import read_json_object
from adapters.sidecar import Sidecar, read_sidecar
from studio.base import EMBEDDED_DIR
from studio.card import HUB_ID, public_name
from studio.errors import AdapterFileError, ExportError, JobError, StudioError
from studio.jobs import Job, open_job
from studio.methods import REWARD_HEAD
from studio.models import resolve_base


@dataclass(frozen=True)
class Origin:
    """What an export is made from.

    Attributes:
        base_name: the base as its job or adapter calls it.
        sidecar: the adapter's; None without one.
    """

    base: Path
    base_name: str
    adapter: Path | None = None
    job: Job | None = None
    sidecar: Sidecar | None = None

    @property
    def model_type(self) -> str:
        """The base's family."""
        return str(read_json_object(self.base / "config.json").get("model_type"))

    @property
    def path_or_id(self) -> str:
        """The base as other programs find it."""
        return str(self.base) if self.base_name == "embedded" else self.base_name

    @property
    def public_name(self) -> str:
        """The base as exports call it: never a path of this machine.

        A folder has the hub id that the adapter was trained with, where there is one, else its own name.
        """
        if self.base.resolve() == EMBEDDED_DIR.resolve():
            return "embedded"
        trained = self.sidecar.base_name if self.sidecar else ""
        names = [public_name(name) for name in (self.base_name, trained) if name]
        return next((name for name in names if HUB_ID.fullmatch(name)), names[0])

    @property
    def held(self) -> dict[str, Any] | None:
        """How training held the base, if it was quantised."""
        return self.sidecar.held_quantized if self.sidecar else None


def find_origin(what: str, base: str | None = None) -> Origin:
    """The base and the adapter that `what` stands for.

    Raises:
        StudioError: there is no such job, adapter or model, the job has no adapter, or its base is not here.
    """
    path = Path(what).expanduser()
    if (path / "recipe.yaml").is_file():
        return _from_job(open_job(path), base)
    if (path / "compact_adapter.safetensors").is_file():
        raise AdapterFileError(
            f"{path} is in the compact form; write the standard one first: studio convert {path} OUT --to peft"
        )
    if (path / "adapter_config.json").is_file():
        return _from_adapter(path, base)
    if base is not None:
        raise ExportError(f"{what} is no adapter and no job, so it has no --base; leave --base out to export a model")
    return Origin(resolve_base(what), what)


def _from_job(job: Job, base: str | None) -> Origin:
    if not (job.path / "adapter" / "adapter_config.json").is_file():
        raise JobError(f"{job.name} has no adapter: it is {job.state().status}. Export a job that succeeded")
    name = base or job.recipe().model.base
    adapter = job.path / "adapter"
    _writes_text(adapter)
    return Origin(resolve_base(name), name, adapter, job, read_sidecar(adapter))


def _writes_text(adapter: Path) -> None:
    if (adapter / REWARD_HEAD).is_file():
        raise ExportError(
            f"{adapter} is a reward model: it scores texts and writes none, so it is not for these formats. studio "
            "merge writes the merged weights with the head; the reward reward_model reads the job as it is "
            "(docs/preference.md)"
        )


def _from_adapter(adapter: Path, base: str | None) -> Origin:
    _writes_text(adapter)
    name = base or read_json_object(adapter / "adapter_config.json", AdapterFileError).get("base_model_name_or_path")
    if not name:
        raise AdapterFileError(f"{adapter / 'adapter_config.json'} does not name its base model; give it with --base")
    job = open_job(adapter.parent) if adapter.name == "adapter" and (adapter.parent / "recipe.yaml").is_file() else None
    try:
        directory = resolve_base(str(name))
    except StudioError as error:
        raise error if base else AdapterFileError(f"{error}. Give the base of {adapter} with --base") from None
    return Origin(directory, str(name), adapter, job, read_sidecar(adapter))
