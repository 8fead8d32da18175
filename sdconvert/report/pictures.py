"""The pictures of a run: collected from the stages that made them, measured, and laid out side by side."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from sdconvert.artifacts import RunFolder
from sdconvert.calibration.artifact import CalibrationArtifact
from sdconvert.errors import PreconditionError
from sdconvert.metrics import psnr_db, psnr_y, ssim_y
from sdconvert.qnn.artifact import QnnArtifact
from sdconvert.quantize.artifact import QuantizeArtifact

LABELS = {
    "low_resolution": "low resolution",
    "bicubic": "bicubic",
    "fp32": "fp32",
    "nearest": "rounded to nearest",
    "quantized": "quantized",
    "simulator": "HTP simulator",
    "original": "original",
}
"""Every kind of picture, in the order in which it is shown."""
TILE = "-tile"
"""Ends the names of the crops that are one tile large, which the simulator draws too."""

_Picture = TypeVar("_Picture")
_GAP, _LINE, _FONT = 8, 24, 15  # pixels


def collect_pictures(run: RunFolder) -> dict[str, dict[str, Tensor]]:
    """Return of every held-out crop, by name, its pictures by the keys of `LABELS`, each (3, H, W) in [0, 1].

    The low-resolution picture is enlarged to the size of the others, pixel by pixel.

    Raises:
        PreconditionError: There are no pictures, or the quantized model or the simulator left one out.
    """
    folder = run.stage_folder("20-calibration")
    crops = CalibrationArtifact(folder).pictures()
    if not crops:
        raise PreconditionError(f"`{folder}` holds no pictures", hint="make them with `sdconvert calibrate`")
    quantized = QuantizeArtifact(run.stage_folder("30-quantize")).pictures()
    simulated = QnnArtifact(run.stage_folder("60-qnn")).pictures()
    found: dict[str, dict[str, Tensor]] = {}
    for name, pictures in crops.items():
        every = pictures | _drawn(quantized, name, "30-quantize")
        if name.endswith(TILE):
            every["simulator"] = _drawn(simulated, name, "60-qnn")
        every["low_resolution"] = _enlarge(every["low_resolution"], every["original"].shape[-2:])
        found[name] = {variant: every[variant] for variant in LABELS if variant in every}
    # A photograph first, then its tile, which the alphabet puts before it.
    return {name: found[name] for name in sorted(found, key=lambda name: (name.removesuffix(TILE), name))}


def measure_pictures(pictures: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Compare a crop's pictures with its original (PSNR-Y, SSIM-Y), converted ones with fp32's too (PSNR, range 1)."""
    figures = {
        variant: {
            "psnr_y_db": psnr_y(pictures["original"], picture),
            "ssim_y": ssim_y(pictures["original"], picture),
        }
        for variant, picture in pictures.items()
        if variant != "original"
    }
    for variant in figures.keys() & {"nearest", "quantized", "simulator"}:
        figures[variant]["psnr_vs_fp32_db"] = psnr_db(pictures["fp32"], pictures[variant], data_range=1.0)
    return figures


def compose_strip(rows: Sequence[Mapping[str, Tensor]], *, scale: int) -> Tensor:
    """Lay out crops as rows of pictures, each over its label and its PSNR-Y against the original.

    Args:
        rows: Pictures of one crop each, as `collect_pictures` gives them; all of one size, the same kinds in each.
        scale: Pixels of the strip per pixel of a picture, along a side.

    Returns:
        (3, H, W) in [0, 1].
    """
    height, width = (scale * side for side in rows[0]["original"].shape[-2:])
    pitch = (height + _LINE + _GAP, width + _GAP)
    columns = [variant for variant in rows[0] if variant != "original"]
    canvas = Image.new("RGB", (pitch[1] * len(columns) + _GAP, pitch[0] * len(rows) + _GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_FONT)
    for down, pictures in enumerate(rows):
        figures = measure_pictures(pictures)
        for across, variant in enumerate(columns):
            left, top = _GAP + across * pitch[1], _GAP + down * pitch[0]
            canvas.paste(_to_image(_enlarge(pictures[variant], torch.Size((height, width)))), (left, top))
            text = f"{LABELS[variant]}  {figures[variant]['psnr_y_db']:.1f} dB"
            draw.text((left + width // 2, top + height + 4), text, fill="black", font=font, anchor="ma")
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255


def _drawn(pictures: Mapping[str, _Picture], name: str, stage: str) -> _Picture:
    if name not in pictures:
        found = ", ".join(pictures) or "none"
        raise PreconditionError(
            f"`{stage}` holds no picture of `{name}`; found {found}", hint=f"redo it: --from {stage} --fresh"
        )
    return pictures[name]


def _enlarge(picture: Tensor, size: torch.Size) -> Tensor:
    return functional.interpolate(picture[None], tuple(size), mode="nearest-exact")[0]


def _to_image(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy())
