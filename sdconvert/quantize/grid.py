"""Weights on their integer grid in plain torch: what any reader of an encodings file computes with.

An encoding of AIMET's form 0.6.1 says w = scale * (q + offset) with q in 0 … 2^b - 1. Symmetric grids are taken as
signed integers here, as the simulation takes them: adding 128 before rounding would move ties.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdconvert.errors import EncodingsError
from sdconvert.io.encodings import Encoding
from sdconvert.plugins import PluginGroup, SinglePluginBlock


@dataclass(frozen=True)
class WeightGrid:
    """The grid of one weight: scale * step for whole steps between `lowest` and `highest`, zero among them.

    Attributes:
        scale: (1,), (channels,) along the weight's first dimension, or (channels * blocks,): in each channel, block
            after block of the second dimension.
        zero_point: Integer that stands for zero, as many as scales.
        bounds: Smallest and largest integer.
    """

    scale: Tensor
    zero_point: Tensor
    bounds: tuple[int, int]

    @classmethod
    def from_encodings(cls, entries: Sequence[Encoding], shape: Sequence[int]) -> "WeightGrid":
        """The grid that encodings give a weight of a shape.

        Raises:
            EncodingsError: Their number is neither one, nor the number of channels or of equal blocks of them, or they
                are no one integer grid.
        """
        channels = shape[0] if shape else 1
        blocks, rest = divmod(len(entries), channels)
        if len(entries) != 1 and (rest or not blocks or (blocks > 1 and (len(shape) < 2 or shape[1] % blocks))):
            raise EncodingsError(
                f"{len(entries)} encodings for a weight of shape {tuple(shape)}",
                hint=f"expected 1, {channels}, or as many in blocks",
            )
        kinds = {(entry["dtype"], entry["bitwidth"], entry.get("is_symmetric")) for entry in entries}
        if len(kinds) != 1 or (kind := kinds.pop())[0] != "int":
            raise EncodingsError("the encodings of one weight are no one integer grid", hint="quantize it to integers")
        _, bitwidth, symmetric = kind
        lowest = -(2 ** (bitwidth - 1)) if symmetric == "True" else 0
        return cls(
            torch.tensor([entry["scale"] for entry in entries], dtype=torch.float32),
            torch.tensor([lowest - entry["offset"] for entry in entries], dtype=torch.int32),
            (lowest, lowest + 2**bitwidth - 1),
        )

    def quantize(self, weight: Tensor) -> Tensor:
        """The weight rounded to the nearest value of the grid, bit-equal to AIMET's simulation.

        The gradient passes straight through where the weight is inside the range, and is zero outside.
        """
        scale, zero_point = self.scale.to(weight.device), self.zero_point.to(weight.device)
        if len(scale) == 1:
            return torch.fake_quantize_per_tensor_affine(weight, scale[0], zero_point[0], *self.bounds)
        if len(scale) == len(weight):
            return torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, *self.bounds)
        # AIMET multiplies by 1 / scale per channel, and divides by the scale per block: ties differ.
        steps = self.to_steps(weight)
        return self.from_steps(steps + (steps.round() - steps).detach())

    def codes(self, weight: Tensor) -> Tensor:
        """The integers that stand for the nearest values of the grid, int32 in the weight's shape."""
        return self.to_steps(self.quantize(weight)).round().int() + self._spread(self.zero_point, weight).int()

    def to_steps(self, weight: Tensor) -> Tensor:
        """The weight in steps of the scale from zero, not rounded."""
        return weight / self._spread(self.scale, weight)

    def from_steps(self, steps: Tensor) -> Tensor:
        """The weight of a number of steps, which are cut off at the ends of the grid."""
        lowest, highest = (self._spread(bound - self.zero_point, steps) for bound in self.bounds)
        return steps.clamp(lowest, highest) * self._spread(self.scale, steps)

    def _spread(self, values: Tensor, like: Tensor) -> Tensor:
        """One value per scale as a tensor that a weight-shaped one can be multiplied with."""
        channels = like.shape[0] if like.dim() else 1
        if len(values) in (1, channels):
            return values.to(like).reshape(-1, *[1] * (like.dim() - 1))
        blocks = len(values) // channels
        spread = values.to(like).reshape(channels, blocks).repeat_interleave(like.shape[1] // blocks, 1)
        return spread.reshape(channels, like.shape[1], *[1] * (like.dim() - 2))


class FakeQuantBlock(SinglePluginBlock):
    """Has a layer compute with a weight's nearest values on a grid; `fuse` makes them the weight.

    Args:
        name: Of the plugin on its host.
        host: The layer.
        grid: Of the weight.
        hook_param: The weight's name.
    """

    def __init__(self, name: str, host: nn.Module, grid: WeightGrid, hook_param: str = "weight") -> None:
        super().__init__(name, host, hook_param)
        self.grid = grid

    def forward(self, host_param: Tensor) -> Tensor:
        """Round to nearest, with a straight-through gradient."""
        return self.grid.quantize(host_param)


@contextmanager
def fake_quantized(model: nn.Module, encodings: Mapping[str, Sequence[Encoding]]) -> Iterator[PluginGroup]:
    """Have a model compute with quantized weights inside the block, everything else in floating point.

    Args:
        model: Its own weights stay as they are.
        encodings: Of weights by name.

    Raises:
        EncodingsError: An entry is for no parameter of the model, or does not fit it.
    """
    parameters = dict(model.named_parameters())
    if unknown := sorted(encodings.keys() - parameters.keys()):
        nearest = difflib.get_close_matches(unknown[0], parameters, 1, cutoff=0)
        raise EncodingsError(
            f"{len(unknown)} encodings are for no parameter of {type(model).__name__}, the first `{unknown[0]}`",
            hint=f"nearest parameter: `{''.join(nearest)}`",
        )
    grids = {key: WeightGrid.from_encodings(entries, parameters[key].shape) for key, entries in encodings.items()}
    group = PluginGroup()
    try:
        for key, grid in grids.items():
            path, _, name = key.rpartition(".")
            group[key] = FakeQuantBlock(f"fake_quant_{name}", model.get_submodule(path), grid, name)
        yield group
    finally:
        for plugin in reversed(group.plugins):
            if plugin.attached:
                plugin.remove()
