"""What the android stage leaves for later stages: the bundle as a folder and as a tar."""

from functools import cached_property
from pathlib import Path

from sdconvert.android.manifest import Manifest
from sdconvert.errors import PreconditionError

BUNDLE = "bundle"


def tar_path(folder: Path) -> Path:
    """Return where the tar of a bundle folder lies: beside it."""
    return folder.with_name(f"{folder.name}.tar")


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
