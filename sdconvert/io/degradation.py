"""The one fixed degradation that every super-resolution figure of this project is measured under.

A photograph becomes its low-resolution picture in the order in which a cheap camera and a messenger spoil it: optical
blur, four-fold reduction, sensor noise, JPEG. The four constants below are the whole definition; training, calibration,
evaluation and the report call `degrade`, so that their figures can be compared. The noise is that of poor light, well
inside the range on which blind super-resolution is trained (Real-ESRGAN, Wang et al. 2021: 1 to 30).
"""

from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from sdconvert.errors import UsageError

FACTOR = 4
BLUR_SIGMA = 1.2  # pixels of the full picture
NOISE_SIGMA = 25 / 255  # of the low-resolution picture, on [0, 1]
JPEG_QUALITY = 60
_BLUR_RADIUS = 5  # 4 sigma: the tail that is cut off weighs less than 3e-5


def degrade(image: Tensor, seed: int) -> Tensor:
    """Spoil a photograph: Gaussian blur, 4x bicubic reduction, Gaussian noise, JPEG.

    Args:
        image: RGB photograph, (3, H, W) in [0, 1], H and W multiples of 4 and at least 8.
        seed: Seed of the noise; the same image and seed give the same picture.

    Returns:
        Low-resolution picture, (3, H/4, W/4) in [0, 1], float32 on the CPU, on the 8-bit grid.

    Raises:
        UsageError: If the shape or the range of `image` does not fit.
    """
    _check(image)
    blurred = _blur(image.detach().to("cpu", torch.float32))
    reduced = _resize(blurred, (image.shape[1] // FACTOR, image.shape[2] // FACTOR))
    noise = torch.randn(reduced.shape, generator=torch.Generator().manual_seed(seed))
    return _jpeg((reduced + NOISE_SIGMA * noise).clamp(0, 1))


def enlarge(image: Tensor) -> Tensor:
    """Bring a low-resolution picture back to full size by bicubic interpolation: the control image and the baseline.

    Args:
        image: Picture(s), (..., 3, h, w) in [0, 1].

    Returns:
        Picture(s) of four times the size, (..., 3, 4h, 4w), clamped to [0, 1].
    """
    return _resize(image, (image.shape[-2] * FACTOR, image.shape[-1] * FACTOR)).clamp(0, 1)


def crop_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Cut the right and bottom border so that both sides are multiples of `multiple`.

    Args:
        image: Picture(s), (..., H, W).
        multiple: Pixels; a whole latent needs `FACTOR` times the VAE factor times the UNet's reduction.

    Raises:
        UsageError: If a side is shorter than `multiple`.
    """
    height, width = (side - side % multiple for side in image.shape[-2:])
    if not height or not width:
        raise UsageError(
            f"A picture of {image.shape[-2]}x{image.shape[-1]} has no side of {multiple} pixels.",
            hint=f"Use a picture of at least {multiple}x{multiple}.",
        )
    return image[..., :height, :width]


def _check(image: Tensor) -> None:
    if image.ndim != 3 or image.shape[0] != 3 or any(side % FACTOR or side < 8 for side in image.shape[1:]):
        raise UsageError(
            f"The degradation takes a (3, H, W) photograph with sides that are multiples of {FACTOR} and at least 8; "
            f"found {tuple(image.shape)}.",
            hint="Cut it with crop_to_multiple first.",
        )
    if not 0 <= float(image.min()) <= float(image.max()) <= 1:
        raise UsageError(
            f"The degradation takes values in [0, 1]; found {float(image.min()):.3g} to {float(image.max()):.3g}.",
            hint="Divide 8-bit pixels by 255; map [-1, 1] by x / 2 + 0.5.",
        )


def _blur(image: Tensor) -> Tensor:
    offsets = torch.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1, dtype=torch.float32)
    kernel = torch.exp(-(offsets**2) / (2 * BLUR_SIGMA**2))
    kernel = (kernel / kernel.sum()).repeat(3, 1)
    padded = functional.pad(image[None], (_BLUR_RADIUS,) * 4, mode="reflect")
    rows = functional.conv2d(padded, kernel[:, None, :, None], groups=3)
    return functional.conv2d(rows, kernel[:, None, None, :], groups=3)[0]


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as PIL's bicubic does (Keys' kernel with a = -1/2, widened when reducing), in floating point."""
    batch = image if image.ndim == 4 else image[None]
    resized = functional.interpolate(batch, size=size, mode="bicubic", antialias=True)
    return resized if image.ndim == 4 else resized[0]


def _jpeg(image: Tensor) -> Tensor:
    pixels = image.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    decoded = np.array(Image.open(buffer).convert("RGB"))
    return torch.from_numpy(decoded).permute(2, 0, 1).float() / 255
