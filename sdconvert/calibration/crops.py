"""The crops of a recipe's photographs that calibrate, and those that the result is judged on."""

from pathlib import Path

import torch
from torch import Tensor

from sdconvert.calibration.photographs import photograph_file
from sdconvert.config import Recipe
from sdconvert.errors import UsageError
from sdconvert.io.images import read_image

_TILES_PER_SIDE = 2
TILE = "-tile"
"""Ends the names of held-out crops that are one tile large."""


def calibration_crops(recipe: Recipe, size: int) -> dict[str, Tensor]:
    """Random crops (3, size, size) in [0, 1] of the recipe's photographs, by `<photograph>-<index>`.

    Raises:
        UsageError: A photograph is smaller than a crop.
    """
    generator = torch.Generator().manual_seed(recipe.pipeline.seed)
    crops = {}
    for name in recipe.calibration.photographs:
        picture = _photograph(name, size)
        for index in range(recipe.calibration.crops_per_photograph):
            top, left = (int(torch.randint(extent - size + 1, (), generator=generator)) for extent in picture.shape[1:])
            crops[f"{Path(name).stem}-{index}"] = picture[:, top : top + size, left : left + size]
    return crops


def held_out_crops(recipe: Recipe, tile: int, factor: int) -> dict[str, Tensor]:
    """The middle of each held-out photograph, some tiles of `tile` pixels large, and the first tile of that.

    Raises:
        UsageError: A photograph is smaller than a crop.
    """
    size = _TILES_PER_SIDE * tile - (_TILES_PER_SIDE - 1) * recipe.pipeline.latent_overlap * factor
    crops = {}
    for name in recipe.calibration.held_out:
        picture = _photograph(name, size)
        top, left = ((extent - size) // 2 for extent in picture.shape[1:])
        crop = picture[:, top : top + size, left : left + size]
        stem = Path(name).stem
        crops[stem] = crop
        crops[f"{stem}{TILE}"] = crop[:, :tile, :tile]
    return crops


def _photograph(name: str, size: int) -> Tensor:
    picture = read_image(photograph_file(name))
    if min(picture.shape[1:]) < size:
        raise UsageError(
            f"photograph `{name}` is {picture.shape[2]}x{picture.shape[1]}, smaller than a crop of {size} pixels",
            hint="choose a larger photograph, or a smaller pipeline.latent_tile",
        )
    return picture
