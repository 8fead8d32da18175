"""Where a recipe's checkpoint lies, and how large its models are."""

from math import prod
from pathlib import Path

from sdconvert.assets import asset_path
from sdconvert.errors import CheckpointError
from sdconvert.io.weights_index import read_index, weights_file

_DIFFUSERS = "diffusion_pytorch_model"
PARTS = ("unet", "controlnet", "vae", "text_encoder", "tokenizer", "scheduler")
"""Folders of a diffusers folder of PASD."""
WEIGHTS_STEMS = {"unet": _DIFFUSERS, "controlnet": _DIFFUSERS, "vae": _DIFFUSERS, "text_encoder": "model"}
"""Names of the models' weights files."""


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


def count_parameters(folder: Path) -> dict[str, int]:
    """How many parameters each model of a PASD folder has; safetensors are not read for that, only their headers.

    Raises:
        CheckpointError: A model has no weights, or its file is damaged.
    """
    files = {part: weights_file(folder / part, stem) for part, stem in WEIGHTS_STEMS.items()}
    return {part: sum(map(prod, read_index(file).shapes.values())) for part, file in files.items()}
