"""What is left for others to read: the bundle as a folder and as a tar, and the results of benches."""

from functools import cached_property
from pathlib import Path
from typing import Any

from sdconvert.android.manifest import Manifest
from sdconvert.errors import PreconditionError, UsageError
from sdconvert.io.files import read_json

BUNDLE = "bundle"
RESULT = "bench.json"
RESULT_VERSION = 2
_FIELDS = {"session", "bundle", "model", "soc", "is_device", "runner", "graphs", "test_inputs"}


def tar_path(folder: Path) -> Path:
    """Return where the tar of a bundle folder lies: beside it."""
    return folder.with_name(f"{folder.name}.tar")


def read_bench(path: Path) -> dict[str, Any]:
    """Read a `bench.json`, or the one in a folder.

    Raises:
        UsageError: It is none, or of another version.
    """
    file = path / RESULT if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"no result of a bench at `{path}`", hint="give the folder that `sdconvert bench -o` wrote")
    try:
        result = read_json(file)
    except PreconditionError as error:
        raise UsageError(error.args[0], hint="run `sdconvert bench` again") from error
    version = result.get("schema_version") if isinstance(result, dict) else None
    if version != RESULT_VERSION or not result.keys() >= _FIELDS:
        raise UsageError(
            f"`{file}` is no result of a bench that this sdconvert reads (schema_version {version})",
            hint="run `sdconvert bench` again",
        )
    return dict(result)


class AndroidArtifact:
    """The bundle in a folder of the android stage.

    Raises:
        PreconditionError: The folder holds no bundle.
    """

    def __init__(self, folder: Path) -> None:
        self.bundle = folder / BUNDLE
        self.tar = tar_path(self.bundle)
        if not ((self.bundle / "manifest.json").is_file() and self.tar.is_file()):
            raise PreconditionError(f"`{folder}` holds no bundle", hint="make it with `sdconvert package`")

    @cached_property
    def manifest(self) -> Manifest:
        """The bundle's table of contents."""
        return Manifest.model_validate_json((self.bundle / "manifest.json").read_bytes())
