"""The wavelet colour fix against its definition, level by level, and what follows from it."""

import torch
from torch import Tensor
from torch.nn import functional

from sdconvert.pipelines.color import low_band, wavelet_color_fix


def picture(seed: int, height: int = 40, width: int = 33) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_the_low_band_is_what_the_decomposition_leaves() -> None:
    kernel = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    image = picture(0)
    high, low = torch.zeros_like(image), image
    for radius in (1, 2, 4, 8, 16):
        padded = functional.pad(low, (radius,) * 4, mode="replicate")
        blurred = functional.conv2d(padded, kernel.repeat(3, 1, 1, 1), groups=3, dilation=radius)
        high, low = high + low - blurred, blurred
    torch.testing.assert_close(low_band(image), low)
    torch.testing.assert_close(image - low_band(image), high)


def test_a_picture_on_its_own_colours_is_itself() -> None:
    torch.testing.assert_close(wavelet_color_fix(picture(1), picture(1)), picture(1))


def test_a_shift_of_colour_is_undone() -> None:
    image = 0.3 + 0.4 * picture(2)
    shift = torch.tensor([0.1, -0.2, 0.05])[:, None, None]
    torch.testing.assert_close(wavelet_color_fix(image + shift, image), image)


def test_detail_of_the_reference_does_not_come_through() -> None:
    checkers = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 0.2
    reference = 0.4 + checkers.expand(1, 3, 64, 64)
    fixed = wavelet_color_fix(torch.full((1, 3, 64, 64), 0.5), reference)
    torch.testing.assert_close(fixed, torch.full((1, 3, 64, 64), 0.5), atol=1e-2, rtol=0)


def test_the_result_stays_in_range() -> None:
    fixed = wavelet_color_fix(picture(3), torch.ones(1, 3, 40, 33))
    assert fixed.min() >= 0
    assert fixed.max() == 1
