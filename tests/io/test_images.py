"""Pictures keep their pixels, and the conventions are those that the docstrings state."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdconvert.errors import UsageError
from sdconvert.io.images import read_image, resize, to_luma, write_png


def test_png_round_trip_keeps_all_256_levels(tmp_path: Path) -> None:
    image = torch.arange(256).repeat(3, 2, 1) / 255
    write_png(image, tmp_path / "levels.png")
    assert torch.equal(read_image(tmp_path / "levels.png"), image)
    assert [entry.name for entry in tmp_path.iterdir()] == ["levels.png"]


def test_out_of_range_values_are_clamped_not_wrapped(tmp_path: Path) -> None:
    write_png(torch.tensor([-0.5, 1.5]).expand(3, 1, 2), tmp_path / "clamped.png")
    assert read_image(tmp_path / "clamped.png").unique().tolist() == [0, 1]


def test_orientation_grey_and_alpha_become_upright_rgb(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("L", (4, 2), 128).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 4, 2)
    Image.new("RGBA", (4, 2)).save(tmp_path / "alpha.png")
    assert read_image(tmp_path / "alpha.png").shape == (3, 2, 4)


@pytest.mark.parametrize("content", [None, b"no picture", "truncated"])
def test_bad_files_are_named(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "bad.png"
    if content == "truncated":
        write_png(torch.rand(3, 50, 50), path)
        path.write_bytes(path.read_bytes()[:2000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"bad\.png") as caught:
        read_image(path)
    assert caught.value.hint


def test_only_one_rgb_picture_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\(1, 3, 2, 2\)"):
        write_png(torch.zeros(1, 3, 2, 2), tmp_path / "batch.png")


def test_luma_of_black_white_and_primaries() -> None:
    colours = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    luma = to_luma(colours.T.reshape(3, 1, 5)).flatten() * 255
    assert luma.tolist() == pytest.approx([16, 235, 81.481, 144.553, 40.966], abs=1e-3)


@pytest.mark.parametrize("size", [(12, 10), (90, 70)])
def test_resize_is_that_of_pil(size: tuple[int, int]) -> None:
    image = torch.rand(3, 48, 40, generator=torch.Generator().manual_seed(0))
    for channel, resized in zip(image, resize(image, size), strict=True):
        expected = Image.fromarray(channel.numpy()).resize(size[::-1], Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(expected) - resized.numpy()).max() < 1e-5
    assert resize(image.expand(2, 5, 3, 48, 40), size).shape == (2, 5, 3, *size)
