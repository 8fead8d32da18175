"""The grid of a weight seen as a matrix: per tensor, per channel, or per block of columns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdconvert.io.encodings import Encoding
from sdconvert.quantize.grid import WeightGrid


@dataclass(frozen=True)
class CodeGrid:
    """Values that a weight (out_channels, columns) may take: scale * code, `lowest` <= code <= `highest`.

    Attributes:
        scale: (out_channels, blocks), float32; block k covers an equal share of the columns.
        lowest: (out_channels, 1), float32: smallest code, zero or below.
        bitwidth: Of a code.
        symmetric: Whether AIMET calls the grid symmetric.
        per_tensor: All rows have one scale, and one encoding.
    """

    scale: Tensor
    lowest: Tensor
    bitwidth: int
    symmetric: bool
    per_tensor: bool = False

    @classmethod
    def from_encodings(cls, entries: Sequence[Encoding], shape: Sequence[int]) -> "CodeGrid":
        """The grid that encodings of AIMET's form 0.6.1 give a weight of a shape.

        Raises:
            EncodingsError: As `WeightGrid.from_encodings`.
        """
        grid = WeightGrid.from_encodings(entries, shape)
        lowest = (grid.bounds[0] - grid.zero_point).float()
        columns = max(1, len(grid.scale) // shape[0])
        scale, lowest = (values.reshape(-1, columns).expand(shape[0], columns) for values in (grid.scale, lowest))
        bitwidth = entries[0]["bitwidth"]
        return cls(scale, lowest[:, :1], bitwidth, entries[0].get("is_symmetric") == "True", len(entries) == 1)

    @classmethod
    def symmetric_blocks(cls, scale: Tensor, bitwidth: int) -> "CodeGrid":
        """A symmetric grid with scales (out_channels, blocks)."""
        return cls(scale.float(), torch.full((len(scale), 1), -(2.0 ** (bitwidth - 1))), bitwidth, symmetric=True)

    @property
    def highest(self) -> Tensor:
        """(out_channels, 1): largest code."""
        highest: Tensor = self.lowest + (2**self.bitwidth - 1)
        return highest

    def rows(self, rows: slice) -> "CodeGrid":
        """The grid of some output channels."""
        return replace(self, scale=self.scale[rows], lowest=self.lowest[rows])

    def with_scale(self, scale: Tensor) -> "CodeGrid":
        """The grid with other scales of the same shape."""
        return replace(self, scale=scale)

    def column_scale(self, count: int, columns: slice = slice(None)) -> Tensor:
        """The scale of each weight in some of `count` columns, (out_channels, some columns); perhaps a view."""
        blocks = torch.arange(count)[columns] // (count // self.scale.shape[1])
        return self.scale.expand(-1, len(blocks)) if self.scale.shape[1] == 1 else self.scale[:, blocks]

    def bounds(self, weight: Tensor, columns: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The codes next below and above each weight, where AdaRound may go: (out_channels, some columns) each."""
        floor = (weight[:, columns] / self.column_scale(weight.shape[1], columns)).floor_()
        return floor.clamp(self.lowest, self.highest), floor.add_(1).clamp_(self.lowest, self.highest)

    def nearest(self, weight: Tensor) -> Tensor:
        """The code of each weight's nearest value, bit-equal to AIMET's simulation."""
        scale = self.column_scale(weight.shape[1])
        rounded = self.weight_grid().quantize(weight.reshape(self.scale.numel(), -1)).reshape(weight.shape)
        return (rounded / scale).round()

    def dequantize(self, codes: Tensor) -> Tensor:
        """The values of codes (out_channels, columns)."""
        return codes.to(self.scale, copy=True).mul_(self.column_scale(codes.shape[1]))

    def weight_grid(self) -> WeightGrid:
        """The same grid for the weight as (out_channels * blocks, columns per block)."""
        low = -(2 ** (self.bitwidth - 1)) if self.symmetric else 0
        lowest = self.lowest.expand(self.scale.shape).reshape(-1)
        bounds = (low, low + 2**self.bitwidth - 1)
        return WeightGrid(self.scale.reshape(-1), (low - lowest).to(torch.int32), bounds)

    def encodings(self) -> list[Encoding]:
        """The grid in AIMET's form 0.6.1; blocks of columns follow one another, row after row."""
        rows, blocks = self.scale.shape
        lowest = self.lowest.expand(rows, blocks)
        count = 1 if self.per_tensor else rows * blocks
        pairs = zip(self.scale.reshape(-1)[:count].tolist(), lowest.reshape(-1)[:count].tolist(), strict=True)
        return [
            {
                "bitwidth": self.bitwidth,
                "dtype": "int",
                "is_symmetric": str(self.symmetric),
                "max": scale * (lowest + 2**self.bitwidth - 1),
                "min": scale * lowest,
                "offset": int(lowest),
                "scale": scale,
            }
            for scale, lowest in pairs
        ]
