"""A convolution or linear layer as a matrix product: its input as rows, its weight as (out_channels, columns)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Convolution:
    """How a 2D convolution walks over its input: two numbers each, as `torch.nn.functional.conv2d` takes them."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True)
class RoundedLayer:
    """A layer whose weight is rounded.

    Attributes:
        name: Of the weight, as the model's state dict has it.
        weight_shape: Of the weight.
        convolution: None for a linear layer.
        bias: Name of the bias, if there is one.
    """

    name: str
    weight_shape: tuple[int, ...]
    convolution: Convolution | None = None
    bias: str | None = None

    @property
    def out_channels(self) -> int:
        """Rows of the weight as a matrix."""
        return self.weight_shape[0]

    @property
    def columns(self) -> int:
        """Columns of the weight as a matrix: inputs of one output value."""
        return int(torch.Size(self.weight_shape[1:]).numel())

    @property
    def groups(self) -> int:
        """Parts of the input channels that meet only their own part of the output channels."""
        return self.convolution.groups if self.convolution else 1

    def rows_of_group(self, group: int) -> slice:
        """The output channels of one group."""
        size = self.out_channels // self.groups
        return slice(group * size, (group + 1) * size)


def bands(layer: RoundedLayer, x: Tensor, rows: int) -> Iterator[Tensor]:
    """Cut a layer's input into pieces that give about `rows` rows each, and together every row once.

    Args:
        layer: The layer.
        x: (..., columns) for a linear layer, (batch, in_channels, height, width) for a convolution.
        rows: The most rows of a piece, unless one line of a convolution's output has more.

    Yields:
        (rows, columns) for a linear layer; for a convolution (1, in_channels, h, w), padded already.
    """
    if layer.convolution is None:
        yield from torch.split(x.reshape(-1, x.shape[-1]), rows)
        return
    settings = layer.convolution
    (kernel, _), (stride, stride_x), (dilation, dilation_x) = settings.kernel, settings.stride, settings.dilation
    (down, right) = settings.padding
    padded = F.pad(x, (right, right, down, down))
    reach = dilation * (kernel - 1) + 1
    lines = (padded.shape[2] - reach) // stride + 1
    width = (padded.shape[3] - dilation_x * (settings.kernel[1] - 1) - 1) // stride_x + 1
    step = max(1, rows // width)
    for sample in torch.split(padded, 1):
        for first in range(0, lines, step):
            last = min(first + step, lines) - 1
            yield sample[:, :, first * stride : last * stride + reach]


def unfold(layer: RoundedLayer, band: Tensor, group: int = 0) -> Tensor:
    """The rows that a piece of the input stands for.

    Returns:
        (rows, columns): what each output value of the group is a product of.
    """
    if layer.convolution is None:
        return band
    settings = layer.convolution
    channels = band.shape[1] // settings.groups
    part = band[:, group * channels : (group + 1) * channels]
    if settings.kernel == (1, 1) and settings.stride == (1, 1):
        return part.flatten(2)[0].T
    return F.unfold(part, settings.kernel, settings.dilation, 0, settings.stride)[0].T


def column_sums(layer: RoundedLayer, x: Tensor, group: int = 0) -> tuple[Tensor, int]:
    """Sums over the rows that a layer's input stands for, without making them.

    Args:
        layer: The layer.
        x: As for `bands`.
        group: Of the convolution.

    Returns:
        (columns,), and the number of rows.
    """
    if layer.convolution is None:
        rows = x.reshape(-1, x.shape[-1])
        return rows.sum(0), len(rows)
    settings = layer.convolution
    channels = x.shape[1] // settings.groups
    down, right = settings.padding
    padded = F.pad(x[:, group * channels : (group + 1) * channels], (right, right, down, down)).sum(0)
    lengths = [
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            padded.shape[1:], settings.kernel, settings.stride, settings.dilation, strict=True
        )
    ]

    def window(tap: int, axis: int) -> slice:
        first, stride = tap * settings.dilation[axis], settings.stride[axis]
        return slice(first, first + stride * (lengths[axis] - 1) + 1, stride)

    taps = [
        padded[:, window(row, 0), window(column, 1)].sum((1, 2))
        for row in range(settings.kernel[0])
        for column in range(settings.kernel[1])
    ]
    return torch.stack(taps, 1).reshape(-1), len(x) * lengths[0] * lengths[1]


def project(layer: RoundedLayer, band: Tensor, weight: Tensor, group: int = 0) -> Tensor:
    """The layer's output for a piece of its input, without bias.

    Args:
        layer: The layer.
        band: From `bands`.
        weight: In its own shape.
        group: Of the convolution.

    Returns:
        (rows, output channels of the group).
    """
    rows = layer.rows_of_group(group)
    if layer.convolution is None:
        return band @ weight.T
    settings = layer.convolution
    channels = band.shape[1] // settings.groups
    part = band[:, group * channels : (group + 1) * channels]
    return F.conv2d(part, weight[rows], None, settings.stride, 0, settings.dilation).flatten(2)[0].T
