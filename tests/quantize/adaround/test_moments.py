"""The loss by moments is the loss of the outputs, for every layer and in every mode."""

from pathlib import Path

import pytest
import torch
from adaround_cases import LAYERS, MODES, Data, channels_of, layer_group, make_moments, matrix
from hypothesis import given
from hypothesis import strategies as st

from sdconvert.quantize.adaround.layers import Convolution, RoundedLayer, bands, project, unfold
from sdconvert.quantize.adaround.moments import Channels, GramMoments, LayerGroup

TOLERANCE = {"rtol": 2e-4, "atol": 1e-6}
HALF_TOLERANCE = {"rtol": 5e-3, "atol": 1e-6}  # inputs kept as float16


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_loss_is_that_of_the_outputs(tmp_path: Path, name: str, mode: str) -> None:
    data = Data(LAYERS[name])
    tolerance = HALF_TOLERANCE if mode == "rows" else TOLERANCE
    for group in range(data.layer.groups):
        moments = make_moments(mode, data, tmp_path, group)
        channels = channels_of(matrix(data, group))
        for scale in (0.0, 0.3):
            change = scale * torch.randn(data.weight.shape, generator=torch.Generator().manual_seed(1))
            delta = change.flatten(1)[data.layer.rows_of_group(group)]
            expected = data.loss(data.weight + change, group)
            torch.testing.assert_close(moments.loss(channels, delta).double(), expected, **tolerance)
        output = data.output(data.floating, data.weight)[0, :, data.layer.rows_of_group(group)]
        signal = output.double().square().mean(0)
        torch.testing.assert_close(moments.signal(channels).double(), signal, **tolerance)
        assert moments.count == data.rows()


@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_half_the_derivative_of_the_loss(tmp_path: Path, mode: str) -> None:
    data = Data(LAYERS["3x3"])
    moments, channels = make_moments(mode, data, tmp_path), channels_of(matrix(data))
    delta = 0.2 * torch.randn(channels.weight.shape, generator=torch.Generator().manual_seed(2))
    weight = (data.weight.flatten(1) + delta).double().requires_grad_()
    error = data.output(data.quantized.double(), weight.reshape(data.weight.shape))
    error = error - data.output(data.floating, data.weight)
    error.square().mean((0, 1)).sum().backward()
    assert weight.grad is not None
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if mode == "rows" else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(2 * moments.full_gradient(channels, delta).double(), weight.grad, **tolerance)
    state = moments.start(channels, delta)
    for columns in (slice(0, 64), slice(64, 72)):
        torch.testing.assert_close(2 * moments.gradient(state, columns).double(), weight.grad[:, columns], **tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_a_state_that_is_updated_is_that_of_the_new_difference(tmp_path: Path, mode: str) -> None:
    data = Data(LAYERS["linear"])
    moments, channels = make_moments(mode, data, tmp_path), channels_of(matrix(data))
    generator = torch.Generator().manual_seed(3)
    delta = torch.randn(channels.weight.shape, generator=generator)
    state = moments.start(channels, delta)
    change = torch.randn(len(delta), 6, generator=generator)
    moments.update(state, slice(64, 70), change)
    delta[:, 64:70] += change
    torch.testing.assert_close(state, moments.start(channels, delta), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_some_channels_are_a_part_of_all(tmp_path: Path, mode: str) -> None:
    data = Data(LAYERS["3x3"])
    moments, weight = make_moments(mode, data, tmp_path), matrix(data)
    delta = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4))
    part = moments.loss(Channels(slice(2, 5), weight[2:5]), delta[2:5])
    torch.testing.assert_close(part, moments.loss(channels_of(weight), delta)[2:5], rtol=1e-4, atol=1e-6)


def test_layers_of_one_input_stand_one_after_the_other() -> None:
    data = Data(LAYERS["linear"])
    second = torch.randn(90, 70, generator=torch.Generator().manual_seed(5))  # more channels than columns: unprojected
    both = LayerGroup([data.layer, RoundedLayer("other", (90, 70))], [data.weight, second])
    together, alone = GramMoments.of(both, data.source), GramMoments.of(layer_group(data), data.source)
    assert alone.projected
    assert not together.projected
    channels = channels_of(data.weight)
    delta = 0.1 * torch.ones_like(data.weight)
    torch.testing.assert_close(together.loss(channels, delta), alone.loss(channels, delta), rtol=1e-4, atol=1e-6)
    other = GramMoments.of(LayerGroup(both.layers[1:], both.weights[1:]), data.source)
    delta = 0.1 * torch.ones_like(second)
    torch.testing.assert_close(
        together.loss(Channels(slice(6, 96), second), delta),
        other.loss(channels_of(second), delta),
        rtol=1e-4,
        atol=1e-6,
    )


def test_equal_paths_have_no_residual() -> None:
    data = Data(LAYERS["3x3"], difference=0.0)
    moments = GramMoments.of(layer_group(data), lambda: ((x, None) for x in data.quantized))
    assert moments.loss(channels_of(matrix(data)), torch.zeros(6, 72)).abs().max() == 0


@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    rows=st.integers(1, 40),
)
def test_pieces_of_a_convolution_are_the_whole(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    rows: int,
) -> None:
    layer = RoundedLayer("conv", (4, 2, *kernel), Convolution(kernel, stride, padding, dilation))
    x = torch.randn(2, 2, 6, 7, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(layer.weight_shape, generator=torch.Generator().manual_seed(1))
    whole = torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation).movedim(1, -1).flatten(0, 2)
    pieces = list(bands(layer, x, rows))
    projected = torch.cat([project(layer, band, weight) for band in pieces])
    torch.testing.assert_close(projected, whole, rtol=1e-4, atol=1e-5)
    by_rows = torch.cat([unfold(layer, band) for band in pieces]) @ weight.flatten(1).T
    torch.testing.assert_close(by_rows, whole, rtol=1e-4, atol=1e-5)
