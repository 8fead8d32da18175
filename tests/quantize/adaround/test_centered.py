"""A bias that changes with the weight: what is left of the loss is what no bias could take away."""

from pathlib import Path

import pytest
import torch
from adaround_cases import LAYERS, MODES, Data, channels_of, int4_grid, layer_group, make_moments, matrix
from torch import Tensor

from sdconvert.quantize.adaround.centered import CenteredMoments, Means, MeanSource
from sdconvert.quantize.adaround.layers import RoundedLayer, bands, column_sums, unfold
from sdconvert.quantize.adaround.moments import Channels, GramMoments, LayerGroup, Moments
from sdconvert.quantize.adaround.offsets import OffsetMoments, by_offsets
from sdconvert.quantize.adaround.solve import Measured, SolverSettings, solve


def shifted(layer: RoundedLayer, seed: int = 0, samples: int = 12) -> Data:
    """Inputs, and differences of the paths, whose means are far from zero, as behind a SiLU."""
    data = Data(layer, samples=samples, seed=seed)
    data.quantized += 2
    data.floating += 2.3
    return data


def measured(mode: str, data: Data, folder: Path, group: int = 0) -> tuple[Moments, Means]:
    source = MeanSource(layer_group(data, group), data.source)
    data.source = source  # type: ignore[method-assign]
    return make_moments(mode, data, folder, group), source.means()


def error(data: Data, weight: Tensor, group: int = 0) -> Tensor:
    """Of the output, without bias: (positions, output channels of the group)."""
    full = data.weight.clone()
    full[data.layer.rows_of_group(group)] = weight.reshape(full[data.layer.rows_of_group(group)].shape)
    found = data.output(data.floating, data.weight) - data.output(data.quantized, full)
    return found[0].double()[:, data.layer.rows_of_group(group)]


@pytest.mark.parametrize("name", LAYERS)
def test_sums_are_those_of_the_rows(name: str) -> None:
    data = shifted(LAYERS[name])
    for group in range(data.layer.groups):
        for x in data.quantized:
            rows = torch.cat([unfold(data.layer, band, group) for band in bands(data.layer, x, 11)])
            sums, count = column_sums(data.layer, x, group)
            assert count == len(rows)
            torch.testing.assert_close(sums, rows.sum(0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_the_loss_is_the_variance_of_the_error(tmp_path: Path, name: str, mode: str) -> None:
    data = shifted(LAYERS[name])
    for group in range(data.layer.groups):
        moments, means = measured(mode, data, tmp_path, group)
        weight = matrix(data, group)
        delta = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
        wrong = error(data, weight + delta, group)
        torch.testing.assert_close(
            means.shift(channels_of(weight), delta).double(), wrong.mean(0), rtol=1e-2, atol=1e-3
        )
        loss = CenteredMoments(moments, means).loss(channels_of(weight), delta).double()
        torch.testing.assert_close(loss, wrong.var(0, correction=0), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_and_block_are_those_of_the_loss(tmp_path: Path, mode: str) -> None:
    """And the same whether a state is made anew or brought up to date."""
    data = shifted(LAYERS["3x3"])
    moments = CenteredMoments(*measured(mode, data, tmp_path))
    weight = matrix(data)
    channels = channels_of(weight)
    delta = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    every = slice(0, weight.shape[1])
    gram = moments.block(every)
    torch.testing.assert_close(gram.diagonal(), moments.diagonal, rtol=1e-2, atol=1e-2)
    plain = moments.full_gradient(channels, torch.zeros_like(delta))
    torch.testing.assert_close(moments.full_gradient(channels, delta) - plain, delta @ gram, rtol=1e-2, atol=2e-2)
    quadratic = ((delta @ gram) * delta).sum(1) + 2 * (plain * delta).sum(1)
    losses = [moments.loss(channels, one) for one in (delta, torch.zeros_like(delta))]
    torch.testing.assert_close(losses[0] - losses[1], quadratic, rtol=1e-2, atol=1e-2)
    state = moments.start(channels, None)
    for columns in (slice(0, 64), slice(64, 72)):
        moments.update(state, columns, delta[:, columns])
    torch.testing.assert_close(state, moments.start(channels, delta), rtol=1e-3, atol=1e-3)


def test_offsets_agree() -> None:
    layer = LAYERS["3x3"]
    wide = RoundedLayer("wide", (32, 64, 3, 3), layer.convolution)
    assert by_offsets([wide])
    data = shifted(wide, samples=3)
    source = MeanSource(layer_group(data), data.source)
    moments = OffsetMoments(layer_group(data), source, 1024)
    weight = matrix(data)
    delta = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    loss = CenteredMoments(moments, source.means()).loss(channels_of(weight), delta).double()
    torch.testing.assert_close(loss, error(data, weight + delta).var(0, correction=0), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("method", ["coordinate", "adaround"])
def test_the_bias_takes_the_mean_and_codes_the_rest(method: str) -> None:
    data, other = shifted(LAYERS["linear"], samples=40), shifted(LAYERS["linear"], seed=7)
    other.weight = data.weight
    weight = matrix(data)
    sources = [MeanSource(LayerGroup([one.layer], [one.weight]), one.source) for one in (data, other)]
    found = [Measured(GramMoments.of(source._group, source), source.means()) for source in sources]
    bias = torch.randn(len(weight), generator=torch.Generator().manual_seed(1))
    settings = SolverSettings(method, damping=(0.1,))  # type: ignore[arg-type]
    result = solve(found[0], found[1], Channels(slice(0, 6), weight, bias), int4_grid(weight), settings)
    assert result.bias is not None
    assert not result.figures.fell_back
    rounded = result.grid.dequantize(result.codes)
    torch.testing.assert_close(result.bias, bias + error(data, rounded).mean(0).float(), rtol=1e-3, atol=1e-3)
    left = (error(other, rounded) - (result.bias - bias)).square().mean(0).sum()
    assert result.figures.loss == pytest.approx(float(left), rel=1e-2)
    without = solve(found[0], found[1], channels_of(weight), int4_grid(weight), settings)
    assert without.bias is None
    assert result.figures.loss < 1.05 * without.figures.loss
    # Nearest is what a simulation would do without AdaRound: with the layer's own bias.
    assert result.figures.nearest_loss == pytest.approx(without.figures.nearest_loss, rel=1e-6)


def test_who_falls_back_keeps_the_bias() -> None:
    data, other = shifted(LAYERS["linear"], samples=1), shifted(LAYERS["linear"], seed=1)
    data.quantized, data.floating = data.quantized[:, :1, :1], 3 * data.floating[:, :1, :1]
    other.weight = data.weight
    weight = matrix(data)
    sources = [MeanSource(LayerGroup([one.layer], [one.weight]), one.source) for one in (data, other)]
    found = [Measured(GramMoments.of(source._group, source), source.means()) for source in sources]
    channels = Channels(slice(0, 6), weight, torch.ones(6))
    result = solve(found[0], found[1], channels, int4_grid(weight), SolverSettings(damping=(1e-6,)))
    assert result.figures.fell_back
    assert result.bias is None
