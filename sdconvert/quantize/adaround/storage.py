"""Scratch tensors in files of their own: raw bytes, read into memory that is the reader's.

Not weights and never read by another process, so without header: what a file holds is known only to who wrote it.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdconvert.io.files import atomic_file

_HALF_EXPONENT = 14  # float16 ends just below 2^16; sums of a few values still fit


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, or in memory as it would be in one."""

    path: Path | None
    values: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    own_dtype: torch.dtype
    exponent: int

    @property
    def nbytes(self) -> int:
        """What it takes, in memory or on disk."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, in the type that was given."""
        values = self.values
        if values is None:
            assert self.path is not None  # for the type checker
            values = torch.empty(self.shape, dtype=self.dtype)
            with self.path.open("rb") as file:
                file.readinto(_bytes(values))
        if self.dtype == self.own_dtype:
            return values.clone() if self.values is not None else values
        return values.to(self.own_dtype).mul_(2.0**-self.exponent)


def compact(tensor: Tensor, dtype: torch.dtype) -> StoredTensor:
    """Take a tensor into memory, floats as `dtype`.

    For float16 the tensor is scaled by a power of two that brings its largest value to half of what float16 holds: no
    activation is too large, and small ones keep their eleven bits.
    """
    own = tensor.dtype
    exponent = 0
    if not own.is_floating_point or dtype == own:
        values = tensor.detach().clone(memory_format=torch.contiguous_format)
    else:
        peak = float(tensor.abs().max()) if tensor.numel() else 0.0
        if math.isfinite(peak) and peak > 0:
            exponent = max(-126, min(126, _HALF_EXPONENT - math.frexp(peak)[1]))
        values = (tensor.detach() * 2.0**exponent).to(dtype, memory_format=torch.contiguous_format)
    return StoredTensor(None, values, tuple(values.shape), values.dtype, own, exponent)


def spill(stored: StoredTensor, path: Path) -> StoredTensor:
    """Move what `compact` made into a file.

    Raises:
        EnvironmentProblem: The disk is full.
    """
    assert stored.values is not None  # for the type checker
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(_bytes(stored.values))
    return StoredTensor(path, None, stored.shape, stored.dtype, stored.own_dtype, stored.exponent)


def write_tensor(path: Path, tensor: Tensor, dtype: torch.dtype) -> StoredTensor:
    """Write a tensor to a file, floats as `dtype`.

    Raises:
        EnvironmentProblem: The disk is full.
    """
    return spill(compact(tensor, dtype), path)


def _bytes(values: Tensor) -> memoryview:
    view: memoryview = values.reshape(-1).view(torch.uint8).numpy().data
    return view
