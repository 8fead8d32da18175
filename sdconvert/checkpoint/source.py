"""Where a recipe's checkpoint lies."""

from pathlib import Path

from sdconvert.assets import asset_path
from sdconvert.errors import CheckpointError

PARTS = ("unet", "controlnet", "vae", "text_encoder", "tokenizer", "scheduler")
"""Folders of a diffusers folder of PASD."""


def resolve_checkpoint(path: str) -> Path:
    """The folder that a recipe's `checkpoint.path` means.

    Raises:
        UsageError: No such asset.
        CheckpointError: No such folder, or parts of it are missing.
    """
    folder = asset_path(path.removeprefix("asset:")) if path.startswith("asset:") else Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"`{folder}` is no folder", hint="name a diffusers folder, or asset:pasd_tiny")
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        found = ", ".join(sorted(child.name for child in folder.iterdir())) or "nothing"
        raise CheckpointError(
            f"`{folder}` is no PASD folder: {', '.join(missing)} missing; found {found}",
            hint=f"a PASD folder holds {', '.join(PARTS)}",
        )
    return folder
