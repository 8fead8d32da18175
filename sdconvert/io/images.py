"""The one reader and writer of pictures, and the few transforms whose convention decides a figure."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from sdconvert.errors import UsageError
from sdconvert.io.files import atomic_file


def read_image(path: Path) -> Tensor:
    """Read a picture as RGB, turned upright as its EXIF data says.

    Returns:
        (3, H, W), float32 in [0, 1].

    Raises:
        UsageError: The file is missing, damaged, or no picture.
    """
    try:
        with Image.open(path) as file:
            pixels = np.array(ImageOps.exif_transpose(file).convert("RGB"))
    except FileNotFoundError as error:
        raise UsageError(f"picture `{path}` does not exist", hint="check the path") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UsageError(f"`{path}` cannot be read as a picture: {error}", hint="give an intact PNG or JPEG") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def write_png(image: Tensor, path: Path) -> None:
    """Write a picture as 8-bit PNG, whole or not at all.

    Args:
        image: (3, H, W) in [0, 1]; rounded to the nearest of 256 levels, values outside are clamped.
        path: Ends in `.png`.

    Raises:
        UsageError: The shape is not that of one RGB picture.
        EnvironmentProblem: The disk is full.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise UsageError(f"`{path}`: a picture has shape (3, H, W), found {tuple(image.shape)}")
    pixels = image.detach().cpu().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    with atomic_file(path) as temporary:
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(temporary, format="PNG")


def to_luma(image: Tensor) -> Tensor:
    """Return the luma Y of ITU-R BT.601 in studio range, as the super-resolution literature measures it.

    Black is 16/255 and white 235/255; PSNR-Y is taken over this Y with a data range of 1.

    Args:
        image: RGB, (..., 3, H, W) in [0, 1].

    Returns:
        (..., 1, H, W) in [16/255, 235/255].
    """
    weights = image.new_tensor([65.481, 128.553, 24.966]) / 255
    return torch.einsum("...chw,c->...hw", image, weights).unsqueeze(-3) + 16 / 255


def resize(image: Tensor, size: tuple[int, int], *, method: str = "bicubic") -> Tensor:
    """Resize as PIL does (the kernel widens when reducing), in floating point instead of 8 bits.

    Args:
        image: (..., C, H, W); leading axes are kept.
        size: (height, width) in pixels.
        method: `bicubic` (Keys' kernel, a = -1/2) or `bilinear`.

    Returns:
        (..., C, height, width); bicubic interpolation may leave the range of the input.
    """
    batch = image.reshape(-1, *image.shape[-3:])
    return functional.interpolate(batch, size, mode=method, antialias=True).reshape(*image.shape[:-2], *size)
