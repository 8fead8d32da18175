"""Layers with data of two paths, and what rounding costs them, computed from the outputs themselves."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sdconvert.quantize.adaround.code_grid import CodeGrid
from sdconvert.quantize.adaround.layers import Convolution, RoundedLayer
from sdconvert.quantize.adaround.moments import Channels, GramMoments, LayerGroup, Moments
from sdconvert.quantize.adaround.tiles import PanelMoments, RowMoments

LAYERS = {
    "linear": RoundedLayer("linear", (6, 70)),
    "1x1": RoundedLayer("1x1", (6, 10, 1, 1), Convolution((1, 1))),
    "1x1 stride": RoundedLayer("1x1 stride", (6, 10, 1, 1), Convolution((1, 1), (2, 2))),
    "3x3": RoundedLayer("3x3", (6, 8, 3, 3), Convolution((3, 3), (1, 1), (1, 1))),
    "3x3 stride": RoundedLayer("3x3 stride", (6, 8, 3, 3), Convolution((3, 3), (2, 2), (1, 1))),
    "dilated": RoundedLayer("dilated", (6, 3, 3, 2), Convolution((3, 2), (1, 2), (2, 1), (2, 1))),
    "grouped": RoundedLayer("grouped", (6, 4, 3, 3), Convolution((3, 3), (1, 1), (1, 1), (1, 1), 2)),
}
MODES = ["gram", "panel", "rows"]


class Data:
    """Samples of a layer's input on two paths, correlated between channels as activations are."""

    def __init__(self, layer: RoundedLayer, samples: int = 3, seed: int = 0, difference: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.layer = layer
        self.weight = torch.randn(layer.weight_shape, generator=generator)
        channels = layer.weight_shape[1] * layer.groups
        mixing = torch.randn(channels, channels, generator=torch.Generator().manual_seed(99))
        shape = (samples, 1, channels, 5, 7) if layer.convolution else (samples, 2, 9, channels)
        axis = 2 if layer.convolution else 3
        x = torch.randn(shape, generator=generator)
        self.floating = (x.movedim(axis, -1) @ mixing).movedim(-1, axis).contiguous()
        self.quantized = self.floating + difference * torch.randn(shape, generator=generator)

    def source(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        yield from zip(self.quantized, self.floating - self.quantized, strict=True)

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        """(samples, positions, out_channels)."""
        settings = self.layer.convolution
        if settings is None:
            return F.linear(x, weight).flatten(0, 2)[None]
        x = F.conv2d(
            x.flatten(0, 1), weight, None, settings.stride, settings.padding, settings.dilation, settings.groups
        )
        return x.movedim(1, -1).flatten(0, 2)[None]

    def loss(self, weight: Tensor, group: int = 0) -> Tensor:
        """Mean squared error by output channel of the group."""
        error = self.output(self.quantized, weight) - self.output(self.floating, self.weight)
        return error.double().square().mean((0, 1))[self.layer.rows_of_group(group)]

    def rows(self) -> int:
        return self.output(self.quantized, self.weight).shape[1]


def layer_group(data: Data, group: int = 0) -> LayerGroup:
    return LayerGroup([data.layer], [data.weight], group)


def make_moments(mode: str, data: Data, folder: Path, group: int = 0, chunk: int = 11) -> Moments:
    """Moments of one layer, with chunks and passes too small to see all at once."""
    layers = layer_group(data, group)
    if mode == "gram":
        return GramMoments.of(layers, data.source, chunk)
    folder = folder / f"{mode}-{group}"
    folder.mkdir()
    if mode == "panel":
        return PanelMoments(layers, data.source, folder, chunk, 64)
    return RowMoments(layers, data.source, folder, chunk, 64, data.rows())


def matrix(data: Data, group: int = 0) -> Tensor:
    return data.weight.flatten(1)[data.layer.rows_of_group(group)]


def channels_of(weight: Tensor) -> Channels:
    return Channels(slice(0, len(weight)), weight)


def int4_grid(weight: Tensor, blocks: int = 1) -> CodeGrid:
    """Symmetric, a little too short, so that some weights are cut off."""
    return CodeGrid.symmetric_blocks(weight.reshape(len(weight), blocks, -1).abs().amax(2) / 8, 4)
