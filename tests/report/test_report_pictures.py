"""Pictures keep their pixels on the way into report and strip."""

import runpy
from pathlib import Path

import pytest
import torch

from sdconvert.artifacts import RunFolder
from sdconvert.errors import PreconditionError
from sdconvert.io.images import read_image
from sdconvert.io.tensors import load_tensors
from sdconvert.report.pictures import collect_pictures, compose_strip, measure_pictures

SCRIPT = Path(__file__).parents[2] / "scripts/make_readme_picture.py"


def test_crops_come_in_the_order_in_which_they_are_shown(finished: RunFolder) -> None:
    found = collect_pictures(finished)
    assert list(found) == ["chelsea", "chelsea-tile", "china", "china-tile"]
    assert list(found["china"]) == ["low_resolution", "bicubic", "fp32", "quantized", "original"]
    assert list(found["china-tile"]) == ["low_resolution", "bicubic", "fp32", "quantized", "simulator", "original"]


def test_low_resolution_is_enlarged_pixel_by_pixel(finished: RunFolder) -> None:
    low = load_tensors(finished.stage_folder("20-calibration") / "pictures/china.safetensors")["low_resolution"]
    enlarged = collect_pictures(finished)["china"]["low_resolution"]
    assert torch.equal(enlarged, low.repeat_interleave(4, 1).repeat_interleave(4, 2))


def test_equal_pictures_have_infinite_psnr() -> None:
    picture = torch.rand(3, 16, 16)
    figures = measure_pictures(dict.fromkeys(("fp32", "quantized", "original"), picture))
    assert figures["quantized"] == {
        "psnr_y_db": float("inf"),
        "ssim_y": pytest.approx(1.0),
        "psnr_vs_fp32_db": float("inf"),
    }


@pytest.mark.parametrize("scale", [1, 3])
def test_strip_shows_every_pixel_of_every_picture(scale: int) -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = ("low_resolution", "bicubic", "fp32", "quantized", "simulator", "original")
    rows = [{kind: torch.rand(3, 16, 24, generator=generator) for kind in kinds} for _ in range(2)]
    strip = compose_strip(rows, scale=scale)
    for down, row in enumerate(rows):
        for across, kind in enumerate(kinds[:5]):
            top, left = 8 + down * (16 * scale + 32), 8 + across * (24 * scale + 8)
            shown = strip[:, top : top + 16 * scale : scale, left : left + 24 * scale : scale]
            assert (shown - row[kind]).abs().max() <= 0.5 / 255 + 1e-6
            caption = strip[:, top + 16 * scale : top + 16 * scale + 24, left : left + 24 * scale]
            assert caption.min() < 0.5  # there is writing


def test_script_writes_a_small_png(finished: RunFolder, tmp_path: Path) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    main([str(finished.root), "-o", str(tmp_path / "images/strip.png"), "--scale", "8"])
    assert (tmp_path / "images/strip.png").stat().st_size <= 400_000
    assert read_image(tmp_path / "images/strip.png").shape == (3, 8 + 2 * (128 + 32), 8 + 5 * (128 + 8))


def test_script_refuses_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="holds no pictures"):
        runpy.run_path(str(SCRIPT))["main"]([str(tmp_path)])


def test_psnr_of_the_gate_has_range_one() -> None:
    fp32, off = torch.full((3, 16, 16), 0.25), torch.full((3, 16, 16), 0.26)
    figures = measure_pictures({"fp32": fp32, "quantized": off, "original": fp32})
    assert figures["quantized"]["psnr_vs_fp32_db"] == pytest.approx(40.0, abs=1e-3)
