"""What AdaRound needs to know of a layer's calibration data, in memory that no number of samples changes.

With x the input on the floating-point path, x' on the quantized one, and D = W' - W, what rounding to W' costs is

    E |W' x' - W x|^2  =  tr(D G D^T) - 2 tr(D R^T) + c        summed over the output channels, which are independent
    G = E[x' x'^T],  R = E[W (x - x') x'^T],  c = E |W (x - x')|^2

A solver walks over blocks of columns. What it carries along is a state: D G - R, the gradient, for moments that hold G;
D X' - E, the output's error row by row, for those that hold the inputs themselves (`tiles.py`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdconvert.quantize.adaround.layers import RoundedLayer, bands, project, unfold

Source = Callable[[], Iterator[tuple[Tensor, Tensor | None]]]
"""Gives, as often as it is called, the input of every sample: on the quantized path, and what the floating-point path
has more; None where the two are the same."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers with one input, and so with one G.

    Attributes:
        layers: They walk over the input alike.
        weights: In the layers' own shapes.
        group: Of the convolutions' groups, the one that is meant.
    """

    layers: Sequence[RoundedLayer]
    weights: Sequence[Tensor]
    group: int = 0

    @property
    def columns(self) -> int:
        """Of each weight as a matrix."""
        return self.layers[0].columns

    @property
    def out_channels(self) -> int:
        """Of all layers together, in the group."""
        return sum(layer.out_channels // layer.groups for layer in self.layers)

    def rows(self, source: Source, chunk: int, *, project_difference: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Walk over the data in chunks.

        Args:
            source: Of the inputs.
            chunk: Rows of a chunk, about.
            project_difference: Give W (x - x') of all layers, not x - x'.

        Yields:
            x' as (rows, columns); the difference as (rows, out_channels or columns), or None.
        """
        first = self.layers[0]
        for quantized, difference in source():
            differences = bands(first, difference, chunk) if difference is not None else None
            for band in bands(first, quantized, chunk):
                other = next(differences) if differences is not None else None
                if other is not None and project_difference:
                    parts = zip(self.layers, self.weights, strict=True)
                    other = torch.cat([project(layer, other, weight, self.group) for layer, weight in parts], 1)
                elif other is not None:
                    other = unfold(first, other, self.group)
                yield unfold(first, band, self.group), other


@dataclass(frozen=True)
class Channels:
    """Output channels to be solved.

    Attributes:
        rows: Where they stand among all of their group's.
        weight: As a matrix.
        bias: That may change with the weight: (rows,). None: there is none, or it stays.
    """

    rows: slice
    weight: Tensor
    bias: Tensor | None = None

    def part(self, part: slice) -> "Channels":
        """Some of them."""
        first = self.rows.start
        rows = slice(first + part.start, first + part.stop)
        return Channels(rows, self.weight[part], None if self.bias is None else self.bias[part])


class Moments(ABC):
    """What one `LayerGroup` saw of the data.

    Attributes:
        count: Rows that were seen.
        diagonal: Of G: (columns,).
    """

    count: int
    diagonal: Tensor

    @abstractmethod
    def start(self, channels: Channels, delta: Tensor | None) -> Tensor:
        """The state of a difference (rows, columns), or of none; the solver's own to change."""

    @abstractmethod
    def gradient(self, state: Tensor, columns: slice) -> Tensor:
        """Half the gradient of the loss by some columns of the weight: (rows, some columns)."""

    @abstractmethod
    def block(self, columns: slice) -> Tensor:
        """G among some columns: (some columns, some columns); the caller's own to change."""

    @abstractmethod
    def update(self, state: Tensor, columns: slice, change: Tensor) -> None:
        """Take into the state what changed in some columns of the weight."""

    @abstractmethod
    def subtract_mean(self, state: Tensor, error: Tensor, mean: Tensor) -> None:
        """Take out of the state an error of the output that all rows of the data share.

        Args:
            state: Of some output channels.
            error: Of each: (rows,).
            mean: Of the inputs: (columns,).
        """

    @abstractmethod
    def full_gradient(self, channels: Channels, delta: Tensor) -> Tensor:
        """Half the gradient of the loss by the whole weight: (rows, columns)."""

    @abstractmethod
    def loss(self, channels: Channels, delta: Tensor) -> Tensor:
        """What rounding costs: (rows,), the mean squared error of each output channel."""

    @abstractmethod
    def signal(self, channels: Channels) -> Tensor:
        """Mean square of each output channel on the floating-point path, without bias: (rows,)."""


class QuadraticMoments(Moments):
    """Moments that hold G, wherever it is."""

    @abstractmethod
    def residual_energy(self, channels: Channels) -> Tensor:
        """The constant c of each channel: (rows,)."""

    @abstractmethod
    def panel(self, columns: slice) -> Tensor:
        """Some rows of G, (some columns, columns), until others are asked for."""

    def gradient(self, state: Tensor, columns: slice) -> Tensor:
        """The state is the gradient."""
        return state[:, columns]

    def block(self, columns: slice) -> Tensor:
        """A part of a panel."""
        return self.panel(columns)[:, columns].clone()

    def update(self, state: Tensor, columns: slice, change: Tensor) -> None:
        """G is symmetric: its rows are its columns."""
        state.addmm_(change, self.panel(columns))

    def subtract_mean(self, state: Tensor, error: Tensor, mean: Tensor) -> None:
        """What the error adds to the gradient is its product with the inputs' mean."""
        state.addr_(error, mean, alpha=-1)

    def full_gradient(self, channels: Channels, delta: Tensor) -> Tensor:
        """The state is the gradient."""
        return self.start(channels, delta)

    def loss(self, channels: Channels, delta: Tensor) -> Tensor:
        """tr(D G D^T) - 2 tr(D R^T) + c by channel, from (D G - R) and -R."""
        negative_residual = self.start(channels, None)
        states = self.start(channels, delta).add_(negative_residual)
        return states.mul_(delta).sum(1) + self.residual_energy(channels)

    def signal(self, channels: Channels) -> Tensor:
        """W G W^T + 2 W R^T + c on the diagonal."""
        states = self.start(channels, channels.weight).sub_(self.start(channels, None), alpha=3)
        return states.mul_(channels.weight).sum(1) + self.residual_energy(channels)


class GramMoments(QuadraticMoments):
    """G in memory, and of the difference of the paths whichever is smaller: R itself, or E[(x - x') x'^T].

    Args:
        gram: G.
        cross: R, or E[(x - x') x'^T].
        energy: E |W (x - x')|^2 by output channel with R; else E[(x - x') (x - x')^T].
        count: Rows of the data.
    """

    def __init__(self, gram: Tensor, cross: Tensor, energy: Tensor, count: int) -> None:
        self.gram, self.cross, self.energy, self.count = gram, cross, energy, count
        self.projected = energy.dim() == 1
        self.diagonal = gram.diagonal().clone()

    @classmethod
    def of(cls, group: LayerGroup, source: Source, chunk: int = 1024) -> "GramMoments":
        """Measure.

        Args:
            group: The layers.
            source: Of their input.
            chunk: Rows that are looked at together.
        """
        columns, projected = group.columns, group.out_channels <= group.columns
        gram = torch.zeros(columns, columns)
        cross = torch.zeros(group.out_channels if projected else columns, columns)
        energy = torch.zeros(group.out_channels) if projected else torch.zeros(columns, columns)
        count = 0
        for rows, difference in group.rows(source, chunk, project_difference=projected):
            count += len(rows)
            gram.addmm_(rows.T, rows)
            if difference is None:
                continue
            cross.addmm_(difference.T, rows)
            if projected:
                energy += difference.square().sum(0)
            else:
                energy.addmm_(difference.T, difference)
        for total in (gram, cross, energy):
            total.div_(max(1, count))
        return cls(gram, cross, energy, count)

    def panel(self, columns: slice) -> Tensor:
        """A view."""
        return self.gram[columns]

    def start(self, channels: Channels, delta: Tensor | None) -> Tensor:
        """D G - R."""
        residual = self.cross[channels.rows] if self.projected else channels.weight @ self.cross
        return -residual if delta is None else torch.addmm(residual, delta, self.gram, beta=-1)

    def residual_energy(self, channels: Channels) -> Tensor:
        """As it was summed, or W E[(x - x') (x - x')^T] W^T on the diagonal."""
        if self.projected:
            return self.energy[channels.rows]
        return (channels.weight @ self.energy).mul_(channels.weight).sum(1)
