"""Layers with a bias: the bias makes up for the mean of the output's error, so only what varies is left to the weights.

With m = E[x'], d = E[x - x'] and D = W' - W, the bias that goes best with W' is b' = b + W d - D m (Nagel et al.,
"Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, equation 13, here towards the
floating-point path). Put into the loss, it leaves the moments of x' - m and of the error beyond its mean.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sdconvert.quantize.adaround.layers import column_sums
from sdconvert.quantize.adaround.moments import Channels, LayerGroup, Moments, Source


@dataclass(frozen=True)
class Means:
    """Of a layer's rows: (columns,) each.

    Attributes:
        inputs: m.
        differences: d.
    """

    inputs: Tensor
    differences: Tensor

    def shift(self, channels: Channels, delta: Tensor | None) -> Tensor:
        """Mean of the output's error on the quantized path, W d - D m: (rows,)."""
        error = channels.weight @ self.differences
        return error if delta is None else error - delta @ self.inputs


class MeanSource:
    """A source that takes the means of what it gives, the first time that it is walked through.

    Args:
        group: The layers.
        source: Of their input.
    """

    def __init__(self, group: LayerGroup, source: Source) -> None:
        self._group, self._source = group, source
        self._means: Means | None = None

    def __call__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Walk through the source."""
        if self._means is not None:
            yield from self._source()
            return
        layer, part = self._group.layers[0], self._group.group
        sums, count = torch.zeros(2, self._group.columns), 0
        for quantized, difference in self._source():
            own, rows = column_sums(layer, quantized, part)
            sums[0] += own
            count += rows
            if difference is not None:
                sums[1] += column_sums(layer, difference, part)[0]
            yield quantized, difference
        sums /= max(1, count)
        self._means = Means(sums[0], sums[1])

    def means(self) -> Means:
        """Of the rows, once they were walked through."""
        assert self._means is not None  # for the type checker
        return self._means


class CenteredMoments(Moments):
    """Moments of another object's data without their means.

    Args:
        moments: Of the data.
        means: Of the same data.
    """

    def __init__(self, moments: Moments, means: Means) -> None:
        self._moments, self._means = moments, means
        self.count = moments.count
        self.diagonal = (moments.diagonal - means.inputs.square()).clamp_(min=0)

    def start(self, channels: Channels, delta: Tensor | None) -> Tensor:
        """Of the other object, without the mean of the error."""
        state = self._moments.start(channels, delta)
        self.subtract_mean(state, -self._means.shift(channels, delta), self._means.inputs)
        return state

    def gradient(self, state: Tensor, columns: slice) -> Tensor:
        """The other object's: an error without mean has no product with the inputs' mean."""
        return self._moments.gradient(state, columns)

    def block(self, columns: slice) -> Tensor:
        """G - m m^T."""
        mean = self._means.inputs[columns]
        return self._moments.block(columns).addr_(mean, mean, alpha=-1)

    def update(self, state: Tensor, columns: slice, change: Tensor) -> None:
        """The other object's, without the mean of the change."""
        self._moments.update(state, columns, change)
        self.subtract_mean(state, change @ self._means.inputs[columns], self._means.inputs)

    def subtract_mean(self, state: Tensor, error: Tensor, mean: Tensor) -> None:
        """The other object's."""
        self._moments.subtract_mean(state, error, mean)

    def full_gradient(self, channels: Channels, delta: Tensor) -> Tensor:
        """From the state."""
        return self.gradient(self.start(channels, delta), slice(0, channels.weight.shape[1]))

    def loss(self, channels: Channels, delta: Tensor) -> Tensor:
        """Mean square of the error less the square of its mean."""
        return self._moments.loss(channels, delta).sub_(self._means.shift(channels, delta).square_()).clamp_(min=0)

    def signal(self, channels: Channels) -> Tensor:
        """The other object's: of the output as it is."""
        return self._moments.signal(channels)
