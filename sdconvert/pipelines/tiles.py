"""Tiles of one static size that cover a picture, blended by Gaussian weights.

A device graph has one input size; a picture has any. Every tile has exactly the graph's size, the last of a row or
column lies flush with the border, and where tiles overlap each pixel is the weighted mean of what they say of it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, product

import torch
from torch import Tensor

from sdconvert.errors import UsageError

# PASD's variance of the weights, in units of the squared tile side.
MIN_VARIANCE = 0.01


@dataclass(frozen=True)
class TileGrid:
    """Where the tiles lie in a picture of `height` x `width` latents.

    Attributes:
        height: Height of the picture in latents.
        width: Width of the picture in latents.
        tile_height: Height of every tile in latents.
        tile_width: Width of every tile in latents.
        overlap: By how many latents neighbours overlap at least.
        corners: Top and left of each tile, row by row.
    """

    height: int
    width: int
    tile_height: int
    tile_width: int
    overlap: int
    corners: tuple[tuple[int, int], ...]

    @classmethod
    def covering(cls, height: int, width: int, tile: int | None = None, overlap: int = 0) -> "TileGrid":
        """Square tiles of side `tile` that overlap by at least `overlap`; without `tile`, one tile is the picture.

        Raises:
            UsageError: The overlap is not in [0, tile), or the picture is smaller than a tile.
        """
        if tile is None:
            return cls(height, width, height, width, 0, ((0, 0),))
        corners = product(_starts(height, tile, overlap), _starts(width, tile, overlap))
        return cls(height, width, tile, tile, overlap, tuple(corners))

    def crop(self, picture: Tensor, index: int, scale: int = 1) -> Tensor:
        """Tile `index` of a picture (…, height·scale, width·scale), with `scale` pixels per latent."""
        rows, columns = self._box(index, scale)
        return picture[..., rows, columns]

    def blend(self, tiles: Iterable[Tensor], scale: int = 1) -> Tensor:
        """Weighted mean of tiles (…, tile_height·scale, tile_width·scale), given in the order of `corners`.

        PASD centres the weights of the rows half a latent off; here both axes are symmetric, so that a mirrored
        picture gives a mirrored result.
        """
        rows_weight = _gaussian(self.tile_height * scale, self.overlap * scale)
        weight = rows_weight[:, None] * _gaussian(self.tile_width * scale, self.overlap * scale)
        total = torch.zeros(self.height * scale, self.width * scale, dtype=torch.float64)
        boxes = [self._box(index, scale) for index in range(len(self.corners))]
        for box in boxes:
            total[box] += weight
        remaining = iter(tiles)
        first = next(remaining)
        picture = first.new_zeros(*first.shape[:-2], *total.shape)
        for (rows, columns), tile in zip(boxes, chain([first], remaining), strict=True):
            picture[..., rows, columns] += tile * (weight / total[rows, columns]).to(tile)
        return picture

    def _box(self, index: int, scale: int) -> tuple[slice, slice]:
        top, left = self.corners[index]
        return (
            slice(top * scale, (top + self.tile_height) * scale),
            slice(left * scale, (left + self.tile_width) * scale),
        )


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    if not 0 <= overlap < tile:
        raise UsageError(f"tiles of {tile} latents cannot overlap by {overlap}", hint=f"choose 0 to {tile - 1}")
    if size < tile:
        raise UsageError(f"{size} latents are less than one tile of {tile}", hint="pad the picture to one tile")
    stride = tile - overlap
    return [min(index * stride, size - tile) for index in range(math.ceil((size - tile) / stride) + 1)]


def _gaussian(size: int, overlap: int) -> Tensor:
    """Weights along one side of a tile, all positive.

    Between two tiles `s` apart, Gaussian weights hand over in a logistic curve of width variance / s. PASD's variance
    suits its tile of 320; at a tile of 32 it would hand over within one latent, a visible seam. So the variance is at
    least s·overlap/8, which spreads the curve over the overlap: from 2 % to 98 %.
    """
    variance = max(MIN_VARIANCE * size**2, (size - overlap) * overlap / 8)
    offset = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    return torch.exp(-offset.square() / (2 * variance))
