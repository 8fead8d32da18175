"""G of a 3x3 convolution from shifted images is the G of its rows, whatever the image's size."""

import pytest
import torch
from adaround_cases import Data, layer_group

from sdconvert.quantize.adaround.layers import Convolution, RoundedLayer
from sdconvert.quantize.adaround.moments import Channels, GramMoments, LayerGroup
from sdconvert.quantize.adaround.offsets import OffsetMoments, by_offsets, gram_by_offsets

PLAIN = RoundedLayer("plain", (6, 8, 3, 3), Convolution((3, 3), (1, 1), (1, 1)))
SIZES = [(1, 1), (1, 4), (3, 1), (2, 2), (2, 5), (3, 3), (5, 7)]


def data_of(size: tuple[int, int], difference: float = 0.1) -> Data:
    data = Data(PLAIN, difference=difference)
    data.floating, data.quantized = (x[..., : size[0], : size[1]].contiguous() for x in (data.floating, data.quantized))
    return data


@pytest.mark.parametrize("size", SIZES)
def test_moments_are_those_of_rows(size: tuple[int, int]) -> None:
    data = data_of(size)
    rows = GramMoments.of(layer_group(data), data.source)
    expanded = gram_by_offsets(layer_group(data), data.source, 4)
    kept = OffsetMoments(layer_group(data), data.source, 4)
    assert rows.count == expanded.count == kept.count
    for name in ("gram", "cross", "energy", "diagonal"):
        torch.testing.assert_close(getattr(expanded, name), getattr(rows, name), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(kept.diagonal, rows.diagonal, rtol=1e-4, atol=1e-3)
    for columns in (slice(0, 64), slice(5, 14), slice(64, 72), slice(71, 72)):
        torch.testing.assert_close(kept.panel(columns), rows.panel(columns), rtol=1e-4, atol=1e-3)


def test_solver_s_questions_have_the_same_answers() -> None:
    data = data_of((5, 7))
    rows = GramMoments.of(layer_group(data), data.source)
    kept = OffsetMoments(layer_group(data), data.source, 4)
    weight = data.weight.flatten(1)
    channels = Channels(slice(2, 6), weight[2:6])
    delta = 0.1 * torch.randn(4, 72, generator=torch.Generator().manual_seed(1))
    for mine, theirs in (
        (kept.start(channels, None), rows.start(channels, None)),
        (kept.full_gradient(channels, delta), rows.full_gradient(channels, delta)),
        (kept.block(slice(10, 70)), rows.block(slice(10, 70))),
        (kept.loss(channels, delta), rows.loss(channels, delta)),
        (kept.signal(channels), rows.signal(channels)),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_without_a_difference_of_the_paths() -> None:
    data = data_of((3, 3))
    source = [(x, None) for x in data.quantized]
    kept = OffsetMoments(layer_group(data), lambda: iter(source), 4)
    channels = Channels(slice(0, 6), data.weight.flatten(1))
    assert float(kept.start(channels, None).abs().max()) == 0
    assert float(kept.residual_energy(channels).max()) == 0


def test_layers_of_one_input_stand_one_after_the_other() -> None:
    data = data_of((5, 7))
    second = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(5))
    both = LayerGroup([PLAIN, RoundedLayer("other", (4, 8, 3, 3), PLAIN.convolution)], [data.weight, second])
    kept, rows = OffsetMoments(both, data.source, 4), GramMoments.of(both, data.source)
    channels = Channels(slice(6, 10), second.flatten(1))
    torch.testing.assert_close(kept.start(channels, None), rows.start(channels, None), rtol=1e-3, atol=1e-3)


def test_what_is_covered() -> None:
    wide = RoundedLayer("wide", (320, 320, 3, 3), Convolution((3, 3), (1, 1), (1, 1)))
    strided = RoundedLayer("strided", (320, 320, 3, 3), Convolution((3, 3), (2, 2), (1, 1)))
    unpadded = RoundedLayer("unpadded", (320, 320, 3, 3), Convolution((3, 3)))
    grouped = RoundedLayer("grouped", (320, 160, 3, 3), Convolution((3, 3), (1, 1), (1, 1), (1, 1), 2))
    assert by_offsets([wide])
    assert not any(by_offsets([layer]) for layer in (strided, unpadded, grouped, PLAIN, RoundedLayer("l", (640, 640))))
    assert not by_offsets([wide] * 10), "more output channels than columns"
