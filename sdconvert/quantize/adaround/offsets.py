"""Moments of 3x3 convolutions from products of shifted images: 13 matrices instead of 81, exact at the borders.

Rows of such a layer's input hold each pixel nine times. G between tap t and tap t' is a sum over positions of x at one
pixel times x at another, t' - t further on. Over the whole image that is a function of the difference only, and the
sums of opposite differences are each other's transposes: (0, 0), (0, 1), (0, 2), (1, -2..2) and (2, -2..2) are left. A
window of positions lacks one line of the image for a tap in an outer row or column. The padding being zero, what it
lacks counts only where both taps lie in the same outer row or column; the two at one corner miss its pixel once, not
twice.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from sdconvert.quantize.adaround.layers import Convolution, RoundedLayer
from sdconvert.quantize.adaround.moments import Channels, GramMoments, LayerGroup, Source
from sdconvert.quantize.adaround.tiles import PanelwiseMoments

_SHIFTS = [(0, across) for across in range(3)] + [(down, across) for down in (1, 2) for across in range(-2, 3)]
_OUTER = (0, 2)
MATRICES = len(_SHIFTS) + 2 * len(_OUTER) * 3 + len(_OUTER) ** 2
"""Matrices (in_channels, in_channels) that are summed."""
_TAPS = range(3)
# Where `_both_ways` has the sum for two taps, and for two places along a line.
_SHIFT_OF = torch.tensor(
    [
        _SHIFTS.index(shift)
        if (shift := (down - row, across - column)) in _SHIFTS
        else len(_SHIFTS) + _SHIFTS.index((row - down, column - across))
        for row in _TAPS
        for column in _TAPS
        for down in _TAPS
        for across in _TAPS
    ]
)
_ALONG_OF = [other - tap if other >= tap else 3 + tap - other for tap in _TAPS for other in _TAPS]
_LEAST_COLUMNS = 9 * 64
_CHANNELS_AT_ONCE = 7  # rows of a panel of `WIDTH`
_CHANNELS_TURNED = 64  # for the next panels too: columns of a large matrix are slow to read, more of them hardly slower
_SUMS_TURNED = 2 * (len(_SHIFTS) + 2 * len(_OUTER) * 3)
ASSEMBLY_ROWS = 4 * 9 * (_CHANNELS_AT_ONCE + 2) + -(-_CHANNELS_TURNED * _SUMS_TURNED // 9)
"""Rows of G that are in memory while a panel is put together."""
_PLAIN = Convolution((3, 3), padding=(1, 1))


def by_offsets(layers: Sequence[RoundedLayer]) -> bool:
    """Whether this file covers layers of one input; those of few channels are quicker without."""
    columns, channels = layers[0].columns, sum(layer.out_channels for layer in layers)
    return layers[0].convolution == _PLAIN and columns >= _LEAST_COLUMNS and channels <= columns


class OffsetSums:
    """What G is made of.

    Args:
        channels: Of the input.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.count = 0
        self._shifted = torch.zeros(len(_SHIFTS), channels, channels)
        # By outer row, or column, and difference along it.
        self._rows, self._columns = (torch.zeros(2, 3, channels, channels) for _ in range(2))
        self._corners = torch.zeros(2, 2, channels, channels)
        self._last: tuple[slice, Tensor] | None = None
        self._turned: tuple[slice, list[Tensor]] | None = None
        self._buffers: dict[str, Tensor] = {}

    def add(self, x: Tensor) -> None:
        """Take in images (batch, channels, height, width)."""
        self._last = self._turned = None
        for image in x:
            _, height, width = image.shape
            self.count += height * width
            # Two zeros between lines: then a shift in the flat image never pairs pixels of wrong lines.
            flat = torch.nn.functional.pad(image, (0, 2)).reshape(self.channels, -1)
            for total, (down, across) in zip(self._shifted, _SHIFTS, strict=True):
                _add(total, flat, down * (width + 2) + across)
            # Taps in the first row see all lines but the last one.
            for outer, line in enumerate((-1, 0)):
                for along in range(3):
                    _add(self._rows[outer, along], image[:, line].contiguous(), along)
                    _add(self._columns[outer, along], image[:, :, line].contiguous(), along)
                for side, column in enumerate((-1, 0)):
                    self._corners[outer, side].addr_(image[:, line, column], image[:, line, column])

    def rows(self, columns: slice) -> Tensor:
        """Some rows of the mean of G, (some columns, columns), until others are asked for."""
        if self._last is None or self._last[0] != columns:
            self._last = columns, self._make_rows(columns)
        return self._last[1]

    def _make_rows(self, columns: slice) -> Tensor:
        self._last = None
        first, last = columns.start // 9, -(-columns.stop // 9)
        part = slice(first, last)
        shifted, *lines = self._both_ways(part)
        # (tap's row, tap's column, other's row, other's column, some channels, channels)
        found = self._buffer("sums", len(_SHIFT_OF), *shifted.shape[1:])
        found = torch.index_select(shifted, 0, _SHIFT_OF, out=found).view(3, 3, 3, 3, *shifted.shape[1:])
        for outer, place in enumerate(_OUTER):
            along_row, along_column = (lines[axis * len(_OUTER) + outer][_ALONG_OF] for axis in range(2))
            found[place, :, place, :] -= along_row.view(3, 3, *shifted.shape[1:])
            found[:, place, :, place] -= along_column.view(3, 3, *shifted.shape[1:])
            for side, column in enumerate(_OUTER):
                found[place, column, place, column] += self._corners[outer, side, part]
        found /= max(1, self.count)
        rows = self._buffer("rows", last - first, 3, 3, self.channels, 3, 3)
        rows.copy_(found.permute(4, 0, 1, 5, 2, 3))
        return rows.view(-1, 9 * self.channels)[columns.start - 9 * first : columns.stop - 9 * first]

    def _buffer(self, name: str, *shape: int) -> Tensor:
        """Memory for values that go when the next ones come."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size)
        return self._buffers[name][:size].view(shape)

    def _both_ways(self, part: slice) -> list[Tensor]:
        """Some rows of all sums by shift and by places along a line, behind them those of their transposes.

        Returns:
            (two times the shifts, some channels, channels) of the whole image, of each outer row, of each outer column.
        """
        if self._turned is None or not self._turned[0].start <= part.start < part.stop <= self._turned[0].stop:
            self._turned = None  # the old ones go before the new ones come
            stop = max(part.stop, min(part.start + _CHANNELS_TURNED, self.channels))
            wide = slice(part.start, stop)
            sums = (self._shifted, *self._rows, *self._columns)
            self._turned = wide, [torch.cat([one[:, wide], one[:, :, wide].transpose(1, 2)]) for one in sums]
        first = self._turned[0].start
        return [both[:, part.start - first : part.stop - first] for both in self._turned[1]]

    def gram(self) -> Tensor:
        """The mean of G, put together a few rows at a time."""
        size = 9 * self.channels
        found = torch.empty(size, size)
        for first in range(0, size, 9 * _CHANNELS_AT_ONCE):
            columns = slice(first, min(first + 9 * _CHANNELS_AT_ONCE, size))
            found[columns] = self._make_rows(columns)
        return found

    def diagonal(self) -> Tensor:
        """Of the mean of G: (columns,)."""
        # (tap's row, tap's column, channels)
        found = self._shifted[0].diagonal().expand(3, 3, -1).clone()
        for outer, place in enumerate(_OUTER):
            found[place] -= self._rows[outer, 0].diagonal()
            found[:, place] -= self._columns[outer, 0].diagonal()
            for side, column in enumerate(_OUTER):
                found[place, column] += self._corners[outer, side].diagonal()
        return found.permute(2, 0, 1).reshape(-1) / max(1, self.count)


def _add(total: Tensor, pixels: Tensor, shift: int) -> None:
    """Add products of all pixels (channels, pixels) that lie so far apart."""
    length = pixels.shape[1]
    if shift < length:
        total.addmm_(pixels[:, : length - shift], pixels[:, shift:].T)


class OffsetMoments(PanelwiseMoments):
    """R in memory, and of G what it is made of.

    Args:
        group: Of layers that `by_offsets` covers.
        source: Of their input.
        chunk: Rows that are looked at together for R.
    """

    def __init__(self, group: LayerGroup, source: Source, chunk: int) -> None:
        self._sums, self._residual, self._energy = _sum(group, source, chunk)
        self.count, self.diagonal = self._sums.count, self._sums.diagonal()

    def panel(self, columns: slice) -> Tensor:
        """Put together."""
        return self._sums.rows(columns)

    def negative_residual(self, channels: Channels, columns: slice) -> Tensor:
        """A part of -R."""
        return -self._residual[channels.rows, columns]

    def residual_energy(self, channels: Channels) -> Tensor:
        """As it was summed."""
        return self._energy[channels.rows]


def gram_by_offsets(group: LayerGroup, source: Source, chunk: int) -> GramMoments:
    """`GramMoments` of layers that `by_offsets` covers."""
    sums, residual, energy = _sum(group, source, chunk)
    return GramMoments(sums.gram(), residual, energy, sums.count)


def _sum(group: LayerGroup, source: Source, chunk: int) -> tuple[OffsetSums, Tensor, Tensor]:
    """Sums for G; the means R and E |W (x - x')|^2."""
    sums = OffsetSums(group.columns // 9)
    residual, energy = torch.zeros(group.out_channels, group.columns), torch.zeros(group.out_channels)
    for quantized, difference in source():
        sums.add(quantized)
        if difference is None:
            continue
        for rows, projected in group.rows(partial(iter, [(quantized, difference)]), chunk, project_difference=True):
            assert projected is not None  # for the type checker
            residual.addmm_(projected.T, rows)
            energy += projected.square().sum(0)
    return sums, residual / max(1, sums.count), energy / max(1, sums.count)
