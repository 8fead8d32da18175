"""The figures against their definitions, and their behaviour at the edges."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage.filters import prewitt
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from sdconvert import metrics
from sdconvert.errors import UsageError
from sdconvert.io.images import to_luma


def picture(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape or (3, 40, 48), generator=torch.Generator().manual_seed(seed))


@given(level=st.floats(-120, 120), seed=st.integers(0, 99))
def test_sqnr_is_the_level_of_the_added_noise(level: float, seed: int) -> None:
    reference, noise = picture(seed).double(), picture(seed + 1).double()
    noise *= reference.norm() / noise.norm() * 10 ** (-level / 20)
    assert metrics.sqnr_db(reference, reference + noise) == pytest.approx(level, abs=1e-3)


def test_equal_tensors_have_no_noise() -> None:
    image = picture(0)
    assert metrics.sqnr_db(image, image) == math.inf
    assert metrics.psnr_db(image, image, data_range=1.0) == math.inf
    assert metrics.psnr_y(image, image) == math.inf
    assert metrics.max_abs(image, image) == 0
    assert metrics.cosine(image, 3 * image) == pytest.approx(1)
    assert metrics.ssim_y(image, image) == pytest.approx(1)


def test_zero_reference() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert metrics.sqnr_db(zero, one) == -math.inf
    assert metrics.sqnr_db(zero, zero) == math.inf
    assert math.isnan(metrics.cosine(zero, one))
    assert metrics.cosine(one, -one) == pytest.approx(-1)


def test_a_broken_output_never_looks_good() -> None:
    assert math.isnan(metrics.sqnr_db(torch.ones(2), torch.tensor([1, math.nan])))
    assert metrics.sqnr_db(torch.ones(2), torch.tensor([1, math.inf])) == -math.inf


def test_psnr_and_ssim_agree_with_scikit_image() -> None:
    reference, image = picture(1), (picture(1) + 0.1 * picture(2)).clamp(0, 1)
    luma = [to_luma(value.double())[0].numpy() for value in (reference, image)]
    assert metrics.psnr_y(reference, image) == pytest.approx(peak_signal_noise_ratio(*luma, data_range=1), abs=1e-6)
    expected = structural_similarity(*luma, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    assert metrics.ssim_y(reference, image) == pytest.approx(expected, abs=2e-3)


def test_float64_sums_see_what_float32_loses() -> None:
    reference = torch.full((1 << 20,), 1e4)
    value = reference.clone()
    value[0] += 1
    assert metrics.sqnr_db(reference, value) == pytest.approx(10 * math.log10(float(np.float64(1e8) * (1 << 20))))


def test_worst_of_several_is_the_lowest_and_never_hides_a_broken_one() -> None:
    references = {"a": torch.ones(4), "b": torch.ones(4), "c": torch.ones(4)}
    values = {"a": torch.full((4,), 1.1), "b": torch.full((4,), 1.01), "c": torch.ones(4)}
    assert metrics.worst_sqnr_db(references, values) == pytest.approx(20, abs=1e-3)
    for broken in "abc":
        assert math.isnan(metrics.worst_sqnr_db(references, values | {broken: torch.full((4,), math.nan)}))
    with pytest.raises(UsageError, match="c in one only"):
        metrics.worst_sqnr_db(references, {"a": values["a"], "b": values["b"]})


def test_max_abs_and_shapes() -> None:
    assert metrics.max_abs(torch.tensor([1.0, -2.0]), torch.tensor([1.0, 3.0])) == 5
    assert metrics.max_abs(torch.empty(0), torch.empty(0)) == 0
    with pytest.raises(UsageError, match=r"\(2,\) and \(3,\)"):
        metrics.sqnr_db(torch.zeros(2), torch.zeros(3))


def test_gradient_similarity_agrees_with_scikit_images_prewitt() -> None:
    reference, image = picture(1), (picture(1) + 0.1 * picture(2)).clamp(0, 1)
    halved = [to_luma(one.double())[0].reshape(20, 2, 24, 2).mean(dim=(1, 3)).numpy() for one in (reference, image)]
    one, other = (math.sqrt(2) * prewitt(luma) for luma in halved)  # scikit-image takes the mean of both directions
    constant = 170 / 255**2
    expected = ((2 * one * other + constant) / (one**2 + other**2 + constant)).mean()
    assert metrics.gradient_similarity_y(reference, image) == pytest.approx(expected, abs=1e-9)
    assert metrics.gradient_similarity_y(reference, reference) == 1
    flat = reference.mean() * torch.ones_like(reference)
    assert metrics.gradient_similarity_y(reference, flat) < 0.9
