"""Rounding up or down by second moments, without gradient steps: GPTQ's order and error feedback, then descent.

GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022) fixes
columns one after another, those of the largest inputs first, and lets the columns still open make up for the error.
Here a code may only be one of the two neighbours of its weight, and the target is the floating-point path's output.
Coordinate descent then changes single codes for as long as that helps.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sdconvert.quantize.adaround.code_grid import CodeGrid
from sdconvert.quantize.adaround.moments import Channels, Moments
from sdconvert.quantize.adaround.tiles import WIDTH

Array = npt.NDArray[np.float32]

_ENOUGH = 1 / 500
"""Of all codes: a sweep that changes fewer is the last. Those behind it take most of the time for 1 % of the loss."""
_STEADY = 1e-6  # of the mean of G's diagonal: what float32 loses in a factorisation


class Rounding:
    """Codes of some output channels on the way to their best.

    Args:
        moments: Of the layer's input.
        channels: To be rounded.
        grid: Of these channels.
        damping: Part of the mean of G's diagonal that is added to the diagonal: what moving away from the weight
            costs, however little of it the data show.
    """

    def __init__(self, moments: Moments, channels: Channels, grid: CodeGrid, damping: float) -> None:
        self._moments, self._channels, self._grid = moments, channels, grid
        mean = float(moments.diagonal.mean())
        # Where no input was ever seen, every rounding is as good: the nearest stays.
        self._damping = (damping + _STEADY) * mean or 1.0

    def sequential(self, block: int) -> tuple[Tensor, Tensor]:
        """GPTQ within blocks of columns; blocks see the error of those before them.

        Args:
            block: Columns of a block; with all of them, plain GPTQ with its order by size of the input.

        Returns:
            Codes (rows, columns), and the moments' state with them.
        """
        weight = self._channels.weight
        codes = torch.empty_like(weight)
        state = self._moments.start(self._channels, None)
        for first in range(0, weight.shape[1], block):
            columns = slice(first, min(first + block, weight.shape[1]))
            hessian = self._moments.block(columns)
            hessian.diagonal().add_(self._damping)
            order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
            hessian = hessian[order][:, order]
            gradient = self._moments.gradient(state, columns)[:, order]
            factor = _factor(hessian)
            target = weight[:, columns][:, order] - torch.cholesky_solve(gradient.T, factor).T
            inverse = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
            del hessian, factor
            scale, low, high = self._limits(columns)
            own = [tensor[:, order] for tensor in (scale, low, high)]
            codes[:, columns.start + order] = _feed_errors_forward(target, inverse, *own)
            self._moments.update(state, columns, codes[:, columns] * scale - weight[:, columns])
        return codes, state

    def descend(self, codes: Tensor, sweeps: int, state: Tensor | None = None) -> Tensor:
        """Coordinate descent: sweeps over all columns until few codes still change.

        Args:
            codes: (rows, columns), changed in place.
            sweeps: The most sweeps.
            state: Of the moments with these codes, if it is known; changed in place.

        Returns:
            The same codes.
        """
        weight = self._channels.weight
        if state is None:
            state = self._moments.start(self._channels, self._grid.dequantize(codes).sub_(weight))
        for _ in range(sweeps):
            changed = 0
            for first in range(0, weight.shape[1], WIDTH):
                columns = slice(first, min(first + WIDTH, weight.shape[1]))
                change = self._descend_block(state, codes, columns)
                if change is not None:
                    changed += int(torch.count_nonzero(change))
                    self._moments.update(state, columns, change)
            if changed <= _ENOUGH * codes.numel():
                break
        return codes

    def _descend_block(self, state: Tensor, codes: Tensor, columns: slice) -> Tensor | None:
        """Change the codes of some columns in place; return the change of the weight, None where there is none."""
        gram = self._moments.block(columns)
        gram.diagonal().add_(self._damping)
        scale, low, high, old = (tensor.T.contiguous() for tensor in (*self._limits(columns), codes[:, columns]))
        weight = self._channels.weight[:, columns].T
        gradient = self._moments.gradient(state, columns).T + self._damping * (old * scale - weight)
        new = old.clone()
        curvature = scale * gram.diagonal()[:, None]
        _descend_columns(*(_array(one) for one in (gradient, gram, curvature, scale, new, low, high)))
        change = ((new - old) * scale).T
        codes[:, columns] = new.T
        return change if bool(change.any()) else None

    def _limits(self, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Of some columns: scale, smallest code, largest code."""
        weight = self._channels.weight
        return self._grid.column_scale(weight.shape[1], columns), *self._grid.bounds(weight, columns)


def _descend_columns(
    gradient: Array, gram: Array, curvature: Array, scale: Array, codes: Array, low: Array, high: Array
) -> None:
    """One code after another to its best, in place; each (columns, rows), `gram` (columns, columns).

    In NumPy: on vectors as short as a layer's channels its calls cost a fifth of torch's.
    """
    for index in range(len(codes)):
        best = np.rint(codes[index] - gradient[index] / curvature[index])
        np.minimum(best, high[index], out=best)
        np.maximum(best, low[index], out=best)
        moved = best - codes[index]
        if moved.any():
            codes[index] = best
            moved *= scale[index]
            gradient[index + 1 :] += gram[index, index + 1 :, None] * moved


def _array(tensor: Tensor) -> Array:
    """A view of a tensor."""
    array: Array = tensor.contiguous().numpy()
    return array


def _factor(hessian: Tensor) -> Tensor:
    """The lower Cholesky factor of a finite matrix; its diagonal grows in place until float32 suffices for one."""
    growth = 0.01 * hessian.diagonal().mean()
    factor, failed = torch.linalg.cholesky_ex(hessian)
    while failed:
        hessian.diagonal().add_(growth)
        growth *= 2
        factor, failed = torch.linalg.cholesky_ex(hessian)
    found: Tensor = factor
    return found


def _feed_errors_forward(target: Tensor, inverse: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Round column after column of a target, each time correcting the columns that follow.

    Args:
        target: (rows, columns).
        inverse: Upper Cholesky factor of the inverse Hessian: (columns, columns).
        scale: (rows, columns).
        low: Smallest codes: (rows, columns).
        high: Largest codes.

    Returns:
        Codes (rows, columns).
    """
    target, scale, low, high = (tensor.T.contiguous() for tensor in (target, scale, low, high))
    codes = torch.empty_like(target)
    for first in range(0, len(target), WIDTH):
        block = slice(first, min(first + WIDTH, len(target)))
        errors = torch.empty_like(target[block])
        own = [*(one[block] for one in (target, scale, low, high, codes)), errors, inverse[block, block]]
        _feed_within(*map(_array, own))
        target[block.stop :].addmm_(inverse[block, block.stop :].T, errors, alpha=-1)
    return codes.T


def _feed_within(
    target: Array, scale: Array, low: Array, high: Array, codes: Array, errors: Array, inverse: Array
) -> None:
    """The same among a few columns, in place; each (columns, rows), `inverse` (columns, columns)."""
    for index in range(len(target)):
        code = np.rint(target[index] / scale[index])
        np.minimum(code, high[index], out=code)
        np.maximum(code, low[index], out=codes[index])
        errors[index] = (target[index] - codes[index] * scale[index]) / inverse[index, index]
        target[index + 1 :] -= inverse[index, index + 1 :, None] * errors[index]
