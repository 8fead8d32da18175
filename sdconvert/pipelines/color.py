"""Wavelet colour fix: the detail of one picture on the colours of another.

The à-trous decomposition of PASD (five levels, radii 1 to 16) telescopes: the sum of all high bands is the picture
minus its lowest band, so only the low band is ever computed.
"""

import torch
from torch import Tensor
from torch.nn import functional

LEVELS = 5


def low_band(image: Tensor) -> Tensor:
    """What remains of images (n, c, h, w) after `LEVELS` blurs with [1 2 1]/4 in both axes, dilated by 1, 2, 4, ….

    Borders are replicated.
    """
    channels = image.shape[1]
    line = torch.tensor([0.25, 0.5, 0.25], dtype=image.dtype, device=image.device)
    kernel = torch.outer(line, line).expand(channels, 1, 3, 3)
    for level in range(LEVELS):
        radius = 2**level
        padded = functional.pad(image, (radius,) * 4, mode="replicate")
        image = functional.conv2d(padded, kernel, groups=channels, dilation=radius)
    return image


def wavelet_color_fix(image: Tensor, reference: Tensor) -> Tensor:
    """High bands of `image` plus the low band of `reference`, both (n, c, h, w) in [0, 1]; clamped to [0, 1]."""
    return (image - low_band(image) + low_band(reference)).clamp(0.0, 1.0)
