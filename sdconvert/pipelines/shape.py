"""Sizes of a run: what was asked for, what the networks see, and the tiles over it."""

from dataclasses import dataclass

from sdconvert.errors import UsageError
from sdconvert.pipelines.tiles import TileGrid


@dataclass(frozen=True)
class SamplingShape:
    """Sizes of one run, as (height, width).

    Attributes:
        requested: Pixels of the result.
        processed: Pixels that the networks see: `requested`, padded to whole latents and to one tile.
        grid: Tiles over the latents of `processed`.
    """

    requested: tuple[int, int]
    processed: tuple[int, int]
    grid: TileGrid

    def as_record(self) -> dict[str, list[int] | int]:
        """The sizes as JSON values, for a manifest."""
        return {
            "requested_px": list(self.requested),
            "processed_px": list(self.processed),
            "tiles": len(self.grid.corners),
        }


def sampling_shape(
    height: int,
    width: int,
    *,
    upscale: int,
    factor: int,
    latent_tile: int | None,
    latent_overlap: int | None,
    multiple: int = 1,
) -> SamplingShape:
    """Sizes for a low-resolution picture of `height` x `width` pixels.

    Args:
        height: Height of the low-resolution picture, or of the result where nothing is enlarged.
        width: Width, likewise.
        upscale: Enlargement, at least 1.
        factor: Pixels per latent.
        latent_tile: Side of a tile in latents; None: no tiles.
        latent_overlap: Overlap of tiles in latents; None: 8 as in PASD, at most half a tile.
        multiple: Latents per patch: sides in latents are multiples of it.

    Raises:
        UsageError: A size or enlargement below 1, an overlap without tiles or not below the tile, or a tile that is
            no multiple of a patch.
    """
    if min(height, width) < 1:
        raise UsageError(f"{height}x{width} pixels are no picture", hint="choose 1 or more")
    if upscale < 1:
        raise UsageError(f"upscale={upscale} does not enlarge", hint="choose 1 or more")
    if latent_tile is None and latent_overlap is not None:
        raise UsageError(f"latent_overlap={latent_overlap} has no effect without tiles", hint="give latent_tile too")
    if latent_tile is not None and latent_tile < 1:
        raise UsageError(f"latent_tile={latent_tile} is no tile", hint="give the side of the device graph in latents")
    requested = height * upscale, width * upscale
    if latent_tile is not None and latent_tile % multiple:
        raise UsageError(
            f"latent_tile={latent_tile} is no multiple of the model's patch of {multiple}",
            hint=f"choose {latent_tile // multiple * multiple or multiple}",
        )
    latents = [max(-(-side // (factor * multiple)) * multiple, latent_tile or 1) for side in requested]
    overlap = min(8, (latent_tile or 0) // 2) if latent_overlap is None else latent_overlap
    grid = TileGrid.covering(latents[0], latents[1], latent_tile, overlap)
    return SamplingShape(requested, (latents[0] * factor, latents[1] * factor), grid)
