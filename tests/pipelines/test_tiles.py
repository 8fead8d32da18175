"""Tiles: every one of the same size, together the whole picture, blended without changing what they agree on."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdconvert.errors import UsageError
from sdconvert.pipelines.tiles import TileGrid


@st.composite
def grids(draw: st.DrawFn) -> TileGrid:
    tile = draw(st.integers(2, 9))
    height, width = draw(st.integers(tile, 20)), draw(st.integers(tile, 20))
    return TileGrid.covering(height, width, tile, draw(st.integers(0, tile // 2 + 1 if tile > 2 else 1)))


@given(grids(), st.integers(1, 3))
def test_every_pixel_is_covered_and_every_tile_has_the_static_size(grid: TileGrid, scale: int) -> None:
    covered = torch.zeros(1, grid.height * scale, grid.width * scale)
    for index in range(len(grid.corners)):
        tile = grid.crop(covered, index, scale)
        assert tile.shape == (1, grid.tile_height * scale, grid.tile_width * scale)
        tile += 1
    assert covered.min() >= 1


@given(grids(), st.integers(1, 3))
def test_blending_the_tiles_of_a_picture_gives_the_picture(grid: TileGrid, scale: int) -> None:
    picture = torch.randn(1, 2, grid.height * scale, grid.width * scale, generator=torch.Generator().manual_seed(0))
    blended = grid.blend((grid.crop(picture, index, scale) for index in range(len(grid.corners))), scale)
    torch.testing.assert_close(blended, picture)


@given(grids())
def test_weights_are_positive_and_sum_to_one_everywhere(grid: TileGrid) -> None:
    count = len(grid.corners)
    marks = torch.eye(count)[:, :, None, None].expand(count, count, grid.tile_height, grid.tile_width)
    shares = grid.blend(marks)  # channel k holds what tile k contributes
    assert shares.min() >= 0
    for index in range(count):
        assert (grid.crop(shares[index], index) > 0).all()
    torch.testing.assert_close(shares.sum(0), torch.ones(grid.height, grid.width))


@given(grids())
def test_a_mirrored_picture_gives_the_mirrored_blend(grid: TileGrid) -> None:
    mirrored = TileGrid(
        grid.height,
        grid.width,
        grid.tile_height,
        grid.tile_width,
        grid.overlap,
        tuple((grid.height - grid.tile_height - top, left) for top, left in grid.corners),
    )
    tiles = torch.randn(
        len(grid.corners), 1, grid.tile_height, grid.tile_width, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(mirrored.blend(tiles.flip(-2)), grid.blend(tiles).flip(-2))


def test_the_last_tile_is_flush_with_the_border_and_neighbours_overlap() -> None:
    assert TileGrid.covering(16, 21, 16, 8).corners == ((0, 0), (0, 5))
    assert TileGrid.covering(8, 20, 8, 2).corners == ((0, 0), (0, 6), (0, 12))
    assert TileGrid.covering(8, 8, 8, 2).corners == ((0, 0),)


def test_the_centre_of_a_tile_prevails_over_the_edge_of_its_neighbour() -> None:
    grid = TileGrid.covering(8, 12, 8, 4)
    blended = grid.blend([torch.zeros(8, 8), torch.ones(8, 8)])
    assert (blended[:, 1:] >= blended[:, :-1]).all()
    torch.testing.assert_close(blended[:, 5] + blended[:, 6], torch.ones(8))
    assert blended[0, 4] < 0.05


@pytest.mark.parametrize(("tile", "overlap"), [(16, 8), (32, 8), (32, 16), (64, 8)])
def test_tiles_hand_over_gradually_across_their_overlap(tile: int, overlap: int) -> None:
    size = 2 * tile - overlap
    blended = TileGrid.covering(tile, size, tile, overlap).blend([torch.zeros(tile, tile), torch.ones(tile, tile)])
    assert blended[0].diff().max() < 2.1 / overlap  # a straight line would rise by 1 / overlap


def test_at_pasds_own_tile_size_the_weights_are_pasds() -> None:
    tile, size = 320, 632
    blended = TileGrid.covering(tile, size, tile, 8).blend([torch.zeros(tile, tile), torch.ones(tile, tile)])[0]
    for column in range(312, 320):
        first, second = (((position - 159.5) / 320) ** 2 / (2 * 0.01) for position in (column, column - 312))
        assert blended[column] == pytest.approx(1 / (1 + math.exp(second - first)), rel=1e-5)


def test_without_tiles_the_blend_is_the_picture_bit_for_bit() -> None:
    grid = TileGrid.covering(5, 7)
    picture = torch.randn(1, 4, 5, 7)
    assert torch.equal(grid.blend([grid.crop(picture, 0)]), picture)


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "message"),
    [(8, 4, 4, "cannot overlap by 4"), (8, 4, -1, "cannot overlap by -1"), (3, 4, 0, "less than one tile")],
)
def test_impossible_grids_are_refused(size: int, tile: int, overlap: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TileGrid.covering(size, size, tile, overlap)


def test_a_wrong_number_of_tiles_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        TileGrid.covering(8, 12, 8, 4).blend([torch.zeros(8, 8)])
