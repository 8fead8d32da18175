"""The figures that compare two tensors or two pictures; everything is summed in float64.

Equal inputs give infinity, not a large number: no constant is added inside a logarithm.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from sdconvert.errors import UsageError
from sdconvert.io.images import to_luma


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio, 10 log10(sum ref^2 / sum (ref - value)^2), in dB."""
    reference, value = _pair(reference, value)
    return _decibels(float(reference.square().sum()), float((reference - value).square().sum()))


def psnr_db(reference: Tensor, value: Tensor, *, data_range: float) -> float:
    """Return the peak signal-to-noise ratio, 10 log10(data_range^2 / mean (ref - value)^2), in dB.

    Args:
        reference: Any shape.
        value: The same shape.
        data_range: Largest minus smallest value that the representation allows: 1.0 for a picture in [0, 1].
    """
    reference, value = _pair(reference, value)
    return _decibels(data_range**2, float((reference - value).square().mean()))


def cosine(reference: Tensor, value: Tensor) -> float:
    """Return the cosine of the angle between two tensors seen as vectors; NaN where one of them is zero."""
    reference, value = _pair(reference, value)
    norms = float(reference.norm()) * float(value.norm())
    return float(reference.flatten() @ value.flatten()) / norms if norms else math.nan


def max_abs(reference: Tensor, value: Tensor) -> float:
    """Return the largest absolute difference of two elements; 0 for empty tensors."""
    reference, value = _pair(reference, value)
    return float((reference - value).abs().max()) if reference.numel() else 0.0


def psnr_y(reference: Tensor, image: Tensor) -> float:
    """Return PSNR in dB of the BT.601 luma (`to_luma`), data range 1.

    Args:
        reference: RGB, (..., 3, H, W) in [0, 1].
        image: The same shape.
    """
    return psnr_db(to_luma(reference.double()), to_luma(image.double()), data_range=1.0)


def ssim_y(reference: Tensor, image: Tensor) -> float:
    """Return the structural similarity of the BT.601 luma: Gaussian window with sigma 1.5, data range 1.

    Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004.

    Args:
        reference: RGB, (..., 3, H, W) in [0, 1].
        image: The same shape.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    reference, image = _pair(reference, image)
    wanted, luma = (to_luma(picture).reshape(-1, 1, *picture.shape[-2:]) for picture in (reference, image))
    similarity = structural_similarity_index_measure(luma, wanted, data_range=1.0)
    assert isinstance(similarity, Tensor)  # a tuple only with return_full_image
    return float(similarity)


def gradient_similarity_y(reference: Tensor, image: Tensor) -> float:
    """Return the mean similarity of gradient magnitudes of the BT.601 luma, 1 for equal pictures.

    Xue et al., "Gradient magnitude similarity deviation", 2014: Prewitt gradients of the picture at half its size,
    `(2 a b + c) / (a² + b² + c)` with c = 170 for pixels up to 255. The mean is taken, not the deviation.

    Args:
        reference: RGB, (..., 3, H, W) in [0, 1].
        image: The same shape.
    """
    reference, image = _pair(reference, image)
    one, other = (_gradients(to_luma(picture).reshape(-1, 1, *picture.shape[-2:])) for picture in (reference, image))
    constant = 170 / 255**2
    return float(((2 * one * other + constant) / (one.square() + other.square() + constant)).mean())


def worst_sqnr_db(references: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> float:
    """Return the lowest SQNR in dB over named tensors; NaN if any of them is, for `min` alone might hide it.

    Raises:
        UsageError: The names differ.
    """
    if references.keys() != values.keys():
        odd = ", ".join(sorted(references.keys() ^ values.keys()))
        raise UsageError(f"two sets of tensors cannot be compared: {odd} in one only", hint="compare like with like")
    levels = [sqnr_db(reference, values[name]) for name, reference in references.items()]
    return math.nan if any(math.isnan(level) for level in levels) else min(levels)


def _pair(reference: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    if reference.shape != value.shape:
        raise UsageError(
            f"tensors of shape {tuple(reference.shape)} and {tuple(value.shape)} cannot be compared",
            hint="compare outputs of the same model for the same input",
        )
    return reference.detach().cpu().double(), value.detach().cpu().double()


def _gradients(luma: Tensor) -> Tensor:
    """Prewitt gradient magnitudes of pictures (n, 1, H, W), averaged over 2x2 pixels before; borders are replicated."""
    halved = functional.pad(functional.avg_pool2d(luma, 2, ceil_mode=True), (1, 1, 1, 1), mode="replicate")
    across = luma.new_tensor([[1.0, 0.0, -1.0]] * 3) / 3
    both = functional.conv2d(halved, torch.stack([across, across.T])[:, None])
    return both.square().sum(dim=1).sqrt()


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio != 0 else -math.inf
