"""Moments on disk, in tiles of a few columns each: for layers whose G does not fit into memory.

`PanelMoments` holds G, `RowMoments` the inputs themselves, which is less where there are fewer rows than columns.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sdconvert.quantize.adaround.moments import Channels, LayerGroup, Moments, QuadraticMoments, Source
from sdconvert.quantize.adaround.storage import StoredTensor, write_tensor

WIDTH = 64
"""Columns of a tile, and of a solver's block: a block never needs two tiles."""


class Tiles:
    """Rows of a large matrix in files of `WIDTH` rows each; the one read last stays in memory.

    Args:
        folder: Exists.
        name: What the files are called.
        dtype: Of the files.
    """

    def __init__(self, folder: Path, name: str, dtype: torch.dtype = torch.float32) -> None:
        self._folder, self._name, self._dtype = folder, name, dtype
        self._tiles: dict[int, StoredTensor] = {}
        self._last: tuple[int, Tensor] | None = None

    def write(self, first: int, rows: Tensor) -> None:
        """Keep rows from `first` on, which begins a tile."""
        for start in range(0, len(rows), WIDTH):
            index = (first + start) // WIDTH
            path = self._folder / f"{self._name}-{index:05d}.bin"
            self._tiles[index] = write_tensor(path, rows[start : start + WIDTH], self._dtype)

    def read(self, rows: slice) -> Tensor:
        """Rows within one tile, as float32."""
        index = rows.start // WIDTH
        if self._last is None or self._last[0] != index:
            self._last = None  # the old one goes before the new one comes
            self._last = index, self._tiles[index].read()
        first = index * WIDTH
        return self._last[1][rows.start - first : rows.stop - first]

    def read_any(self, rows: slice) -> Tensor:
        """Rows of several tiles, as float32."""
        parts = tile_slices(rows)
        first = self.read(next(parts))
        found = first.new_empty(rows.stop - rows.start, first.shape[1])
        found[: len(first)] = first
        del first
        for part in parts:  # one tile at a time beside the result
            found[part.start - rows.start : part.stop - rows.start] = self.read(part)
        return found


def tile_slices(rows: slice) -> Iterator[slice]:
    """Cut rows at the borders of tiles."""
    start = rows.start
    while start < rows.stop:
        stop = min((start // WIDTH + 1) * WIDTH, rows.stop)
        yield slice(start, stop)
        start = stop


class PanelwiseMoments(QuadraticMoments):
    """Moments that give G a panel of `WIDTH` columns at a time."""

    @abstractmethod
    def negative_residual(self, channels: Channels, columns: slice) -> Tensor:
        """Some columns, of one panel, of -R: (rows, some columns)."""

    def block(self, columns: slice) -> Tensor:
        """Of as many panels as the columns lie in."""
        width = columns.stop - columns.start
        found = torch.empty(width, width)
        for part in tile_slices(columns):
            found[part.start - columns.start : part.stop - columns.start] = self.panel(part)[:, columns]
        return found

    def update(self, state: Tensor, columns: slice, change: Tensor) -> None:
        """Panel by panel."""
        for part in tile_slices(columns):
            state.addmm_(change[:, part.start - columns.start : part.stop - columns.start], self.panel(part))

    def start(self, channels: Channels, delta: Tensor | None) -> Tensor:
        """D G - R."""
        every = slice(0, channels.weight.shape[1])
        state = torch.empty_like(channels.weight)
        for part in tile_slices(every):
            state[:, part] = self.negative_residual(channels, part)
        if delta is not None:
            self.update(state, every, delta)
        return state


class TileMoments(Moments):
    """Moments that are made of tiles, in as many passes over the data as memory asks for.

    Args:
        group: The layers.
        source: Of their input.
        folder: Of the tiles; exists, and goes with whoever made it.
        chunk: Rows that are looked at together.
        pass_columns: Columns that one pass makes; a multiple of `WIDTH`.
    """

    def __init__(self, group: LayerGroup, source: Source, folder: Path, chunk: int, pass_columns: int) -> None:
        self._group, self._source, self._chunk = group, source, chunk
        self.columns = group.columns
        self.count = 0
        self.diagonal = torch.zeros(self.columns)
        self.energy = torch.zeros(group.out_channels)
        for first in range(0, self.columns, pass_columns):
            self._make(slice(first, min(first + pass_columns, self.columns)))

    @abstractmethod
    def _make(self, columns: slice) -> None:
        """Make the tiles of some columns in one pass over the data."""

    def _rows(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        return self._group.rows(self._source, self._chunk, project_difference=True)


class PanelMoments(TileMoments, PanelwiseMoments):
    """G and R on disk."""

    def __init__(self, group: LayerGroup, source: Source, folder: Path, chunk: int, pass_columns: int) -> None:
        self._gram, self._residual = Tiles(folder, "gram"), Tiles(folder, "residual")
        super().__init__(group, source, folder, chunk, pass_columns)

    def _make(self, columns: slice) -> None:
        width = columns.stop - columns.start
        gram, residual = torch.zeros(width, self.columns), torch.zeros(width, len(self.energy))
        count = 0
        energy = torch.zeros_like(self.energy)
        for rows, difference in self._rows():
            count += len(rows)
            gram.addmm_(rows[:, columns].T, rows)
            if difference is not None:
                residual.addmm_(rows[:, columns].T, difference)
                energy += difference.square().sum(0)
        self.count, self.energy = count, energy / max(1, count)
        gram /= max(1, count)
        residual /= max(1, count)
        self._gram.write(columns.start, gram)
        self._residual.write(columns.start, residual)
        self.diagonal[columns] = gram[:, columns].diagonal()

    def panel(self, columns: slice) -> Tensor:
        """One tile's rows."""
        return self._gram.read(columns)

    def negative_residual(self, channels: Channels, columns: slice) -> Tensor:
        """From one tile."""
        return -self._residual.read(columns)[:, channels.rows].T

    def residual_energy(self, channels: Channels) -> Tensor:
        """As it was summed."""
        return self.energy[channels.rows]


class RowMoments(TileMoments):
    """The inputs x' by column in float16, and the target W (x - x') by output channel, both on disk.

    Args:
        group: The layers.
        source: Of their input.
        folder: Of the tiles.
        chunk: Rows that are looked at together.
        pass_columns: Columns, or output channels, that one pass makes.
        count: Rows of the data.
    """

    def __init__(
        self, group: LayerGroup, source: Source, folder: Path, chunk: int, pass_columns: int, count: int
    ) -> None:
        self._inputs = Tiles(folder, "inputs", torch.float16)
        self._targets = Tiles(folder, "targets")
        self._length, self._share = count, 1 / math.sqrt(max(1, count))
        super().__init__(group, source, folder, chunk, pass_columns)
        self.count = count
        for first in range(0, len(self.energy), pass_columns):
            self._make_targets(slice(first, min(first + pass_columns, len(self.energy))))

    def _make(self, columns: slice) -> None:
        inputs = torch.empty(columns.stop - columns.start, self._length)
        done = 0
        for rows, _ in self._group.rows(self._quantized_only, self._chunk, project_difference=False):
            inputs[:, done : done + len(rows)] = rows[:, columns].T
            done += len(rows)
        self._inputs.write(columns.start, inputs)
        self.diagonal[columns] = torch.linalg.vector_norm(inputs, dim=1).square_() / max(1, self._length)

    def _make_targets(self, channels: slice) -> None:
        targets = torch.zeros(channels.stop - channels.start, self._length)
        done = 0
        for rows, difference in self._rows():
            if difference is not None:
                targets[:, done : done + len(rows)] = difference[:, channels].T
            done += len(rows)
        self._targets.write(channels.start, targets)

    def _quantized_only(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        return ((quantized, None) for quantized, _ in self._source())

    def start(self, channels: Channels, delta: Tensor | None) -> Tensor:
        """The output's error D X' - E, (rows, rows of the data), over the root of their number."""
        state = -self._share * self._targets.read_any(channels.rows)
        if delta is not None:
            self.update(state, slice(0, self.columns), delta)
        return state

    def gradient(self, state: Tensor, columns: slice) -> Tensor:
        """(D X' - E) X'^T."""
        return torch.cat([state @ self._inputs.read(part).T for part in tile_slices(columns)], 1) * self._share

    def block(self, columns: slice) -> Tensor:
        """X' X'^T."""
        inputs = self._inputs.read_any(columns)
        return (inputs @ inputs.T).mul_(self._share**2)

    def update(self, state: Tensor, columns: slice, change: Tensor) -> None:
        """Tile by tile."""
        for part in tile_slices(columns):
            own = change[:, part.start - columns.start : part.stop - columns.start]
            state.addmm_(own, self._inputs.read(part), alpha=self._share)

    def subtract_mean(self, state: Tensor, error: Tensor, mean: Tensor) -> None:
        """From every row of the data."""
        state.sub_(error[:, None], alpha=self._share)

    def full_gradient(self, channels: Channels, delta: Tensor) -> Tensor:
        """(D X' - E) X'^T, two passes over the tiles."""
        return self.gradient(self.start(channels, delta), slice(0, self.columns))

    def loss(self, channels: Channels, delta: Tensor) -> Tensor:
        """The mean square of the output's error."""
        return self.start(channels, delta).square_().sum(1)

    def signal(self, channels: Channels) -> Tensor:
        """The mean square of W X' + E."""
        states = self.start(channels, channels.weight).sub_(self.start(channels, None), alpha=2)
        return states.square_().sum(1)
