"""What a run leaves on disk: the run folder, and each stage's manifest.

`manifest.json` is the last file of a stage, and what has no manifest does not exist.
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from sdconvert.errors import EnvironmentProblem, PreconditionError
from sdconvert.io.files import TEMPORARY, read_json, sha256_file, write_json_atomic

MANIFEST = "manifest.json"


class Output(BaseModel):
    """One file that a stage wrote."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    bytes: int


class Manifest(BaseModel):
    """What a stage was made from, what it made, and what that took."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    stage: str
    fingerprint: str
    """SHA-256 over stage, inputs, settings and versions."""
    inputs: dict[str, str]
    """SHA-256 of each external input, and the fingerprint of each stage that was read."""
    outputs: dict[str, Output]
    """Every file of the stage by its path below the stage's folder, without this manifest."""
    settings: dict[str, Any]
    """The stage's part of the recipe."""
    versions: dict[str, str]
    """Versions of the tools that matter, and of the stage's own source."""
    metrics: dict[str, Any]
    seconds: float
    peak_rss_bytes: int

    def save(self, folder: Path) -> None:
        """Write `manifest.json`: from now on the stage exists."""
        write_json_atomic(self.model_dump(), folder / MANIFEST)

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Read `manifest.json`; none where it is missing or unreadable, for then the stage does not exist."""
        try:
            return cls.model_validate(read_json(folder / MANIFEST))
        except (PreconditionError, ValidationError):
            return None


class RunFolder:
    """The folder of one recipe's run, with one subfolder per stage."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def stage_folder(self, stage: str) -> Path:
        """Return the folder of a stage such as `30-quantize`; it exists once the stage ran."""
        return self.root / stage

    def manifest(self, stage: str) -> Manifest | None:
        """Return a stage's manifest; none if the stage has not finished."""
        return Manifest.load(self.stage_folder(stage))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep the folder for one process at a time, and sweep away what a killed one left half-written.

        Raises:
            EnvironmentProblem: Another process works in the folder.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise EnvironmentProblem(
                    f"another run is at work in `{self.root}`",
                    hint="wait for it, stop it, or choose another folder with `--build DIR`",
                ) from error
            for leftover in self.root.glob(f"{TEMPORARY}*"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield


def describe_outputs(folder: Path) -> dict[str, Output]:
    """Return size and checksum of every file below a folder, the manifest excepted."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST)
    return {
        file.relative_to(folder).as_posix(): Output(sha256=sha256_file(file), bytes=file.stat().st_size)
        for file in files
    }
