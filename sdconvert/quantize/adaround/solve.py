"""The rounding of one layer, with damping chosen on held-out data; there, never worse than nearest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from sdconvert.errors import UsageError
from sdconvert.quantize.adaround.centered import CenteredMoments, Means
from sdconvert.quantize.adaround.code_grid import CodeGrid
from sdconvert.quantize.adaround.coordinate import Rounding
from sdconvert.quantize.adaround.moments import Channels, Moments
from sdconvert.quantize.adaround.soft import Schedule, train_rounding

Method = Literal["adaround", "coordinate"]
LEAST_ROW_ARRAYS = 6
"""Matrices (channels, columns) that any solver has at once: codes, the difference, states of the moments."""


@dataclass(frozen=True)
class SolverSettings:
    """How layers are rounded.

    Attributes:
        method: `coordinate` is GPTQ held to each weight's two neighbours, then coordinate descent; `adaround` is Adam
            on soft rounding, then coordinate descent.
        damping: Candidates; held-out data choose, by the codes that `coordinate` gives a part of the layer.
        sweeps: The most sweeps of coordinate descent.
        refit_scale: Fit each channel's scale to its codes; the grid is then no longer AIMET's.
        trial_channels: Output channels of that part.
        schedule: Of `adaround`.
    """

    method: Method = "coordinate"
    damping: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    sweeps: int = 10
    refit_scale: bool = False
    trial_channels: int = 128
    schedule: Schedule = field(default_factory=Schedule)

    @property
    def row_arrays(self) -> int:
        """Matrices (channels, columns) that it has at once, Adam's and those of a refit included."""
        return 14 if self.method == "adaround" else LEAST_ROW_ARRAYS + 2 * self.refit_scale


@dataclass(frozen=True)
class Workspace:
    """How much of a layer is worked on at once; see `plan.py`.

    Attributes:
        channels: Output channels.
        block: Columns of one GPTQ block.
    """

    channels: int = 1 << 30
    block: int = 1 << 30


@dataclass(frozen=True)
class LayerFigures:
    """What became of one layer: mean squared errors of its output, summed over channels.

    Attributes:
        damping: That was chosen; of a convolution's groups, the largest.
        fell_back: Nearest was better on held-out data, and was taken; for one of the groups at least.
        changed: Part of the codes that are not the nearest.
        held_out_rows: Rows that losses and SQNR are of; 0: of the calibration data themselves.
        nearest_loss: Rounded to nearest.
        loss: As rounded.
        signal: Mean square of the output on the floating-point path, without bias.
    """

    damping: float
    fell_back: bool
    changed: float
    held_out_rows: int
    nearest_loss: float
    loss: float
    signal: float

    @property
    def nearest_sqnr_db(self) -> float:
        """Of the layer's output, without bias, rounded to nearest, against the floating-point path."""
        return _decibels(self.signal, self.nearest_loss)

    @property
    def sqnr_db(self) -> float:
        """The same as rounded."""
        return _decibels(self.signal, self.loss)


@dataclass(frozen=True)
class LayerResult:
    """What a layer became.

    Attributes:
        codes: (out_channels, columns) as int16.
        grid: Of the codes.
        figures: Of the layer.
        bias: That goes with the codes: (out_channels,). None: the layer's own, if it has one.
    """

    codes: Tensor
    grid: CodeGrid
    figures: LayerFigures
    bias: Tensor | None = None


@dataclass(frozen=True)
class Measured:
    """What was measured of a layer's input: moments, and means for layers whose bias may change."""

    moments: Moments
    means: Means | None = None


@torch.no_grad()
def solve(
    fitted: Measured,
    held_out: Measured | None,
    channels: Channels,
    grid: CodeGrid,
    settings: SolverSettings,
    workspace: Workspace | None = None,
) -> LayerResult:
    """Round one layer.

    Args:
        fitted: Of its calibration data; with means if the channels have a bias.
        held_out: Of data that the codes are not fitted to; without, the middle damping is taken.
        channels: All of the layer's output channels.
        grid: Of the weight.
        settings: Of the solver.
        workspace: What fits into memory; all, if not given.

    Returns:
        Codes that are, with the bias that goes with them, on held-out data no worse than the nearest ones.

    Raises:
        UsageError: Scales are to be refitted by channel, and the grid has one for all.
    """
    if settings.refit_scale and grid.per_tensor:
        raise UsageError("a scale per tensor is not refitted", hint="quantize per channel, or keep the scales")
    task = _Task(fitted, held_out or fitted, settings, workspace or Workspace())
    damping = task.choose_damping(channels, grid) if held_out else sorted(settings.damping)[len(settings.damping) // 2]
    codes = torch.empty(channels.weight.shape, dtype=torch.int16)
    nearest = torch.empty_like(codes)
    scales, biases, sums = [], [], torch.zeros(3, dtype=torch.float64)
    for part in task.parts(channels):
        own = grid.rows(part)
        chosen = channels.part(part)
        codes_part, own = task.round(chosen, own, damping)
        nearest[part] = grid.rows(part).nearest(chosen.weight).to(torch.int16)
        codes[part] = codes_part.to(torch.int16)
        scales.append(own.scale)
        biases.append(task.bias(chosen, own, codes_part))
        sums += task.sums(chosen, grid.rows(part), nearest[part], own, codes[part])
    nearest_loss, loss, signal = sums.tolist()
    fell_back = not loss <= nearest_loss
    bias = None
    if fell_back:
        codes, loss = nearest, nearest_loss
    else:
        grid = grid.with_scale(torch.cat(scales))
        bias = torch.cat([one for one in biases if one is not None]) if channels.bias is not None else None
    figures = LayerFigures(
        damping,
        fell_back,
        int(torch.count_nonzero(codes != nearest)) / codes.numel(),
        held_out.moments.count if held_out else 0,
        nearest_loss,
        loss,
        signal,
    )
    return LayerResult(codes, grid, figures, bias)


def join(parts: Sequence[LayerResult], bias: Tensor | None) -> LayerResult:
    """The result of a whole layer from those of a convolution's groups.

    Args:
        parts: In order.
        bias: Of the layer, which a part that fell back keeps.
    """
    if len(parts) == 1:
        return parts[0]
    figures = [part.figures for part in parts]
    first = parts[0].grid
    grid = replace(
        first,
        scale=torch.cat([part.grid.scale for part in parts]),
        lowest=torch.cat([part.grid.lowest for part in parts]),
    )
    return LayerResult(
        torch.cat([part.codes for part in parts]),
        grid,
        LayerFigures(
            max(one.damping for one in figures),
            any(one.fell_back for one in figures),
            sum(one.changed for one in figures) / len(figures),
            figures[0].held_out_rows,
            sum(one.nearest_loss for one in figures),
            sum(one.loss for one in figures),
            sum(one.signal for one in figures),
        ),
        None
        if bias is None
        else torch.cat(
            [own if part.bias is None else part.bias for part, own in zip(parts, bias.chunk(len(parts)), strict=True)]
        ),
    )


@dataclass(frozen=True)
class _Task:
    """One layer's data and settings."""

    fitted: Measured
    judge: Measured
    settings: SolverSettings
    workspace: Workspace

    def parts(self, channels: Channels) -> list[slice]:
        """Cut the output channels into parts that fit."""
        count, step = len(channels.weight), self.workspace.channels
        return [slice(first, min(first + step, count)) for first in range(0, count, step)]

    def choose_damping(self, channels: Channels, grid: CodeGrid) -> float:
        """A candidate with less held-out loss than its neighbours, on a run of channels from the layer's middle.

        From the middle one on, towards the lesser loss: with more damping the loss falls and then rises, but for noise.
        """
        candidates = sorted(self.settings.damping)
        if len(candidates) == 1:
            return candidates[0]
        count = min(self.settings.trial_channels, self.workspace.channels, len(channels.weight))
        first = (len(channels.weight) - count) // 2
        part = slice(first, first + count)
        trial = channels.part(part)
        # The data ask for a damping, whatever the method; descent from GPTQ's codes is the quick one.
        quick = replace(self, settings=replace(self.settings, method="coordinate", refit_scale=False, sweeps=1))

        @cache
        def loss(index: int) -> float:
            codes, own = quick.round(trial, grid.rows(part), candidates[index])
            found = float(self.loss(trial, own, codes).double().sum())
            return math.inf if math.isnan(found) else found

        place, best = -1, len(candidates) // 2
        while place != best:
            place = best
            best = min(range(max(0, place - 1), min(place + 2, len(candidates))), key=loss)
        return candidates[place]

    def round(self, channels: Channels, grid: CodeGrid, damping: float) -> tuple[Tensor, CodeGrid]:
        """Codes of some channels, and their grid, which is another one if scales are refitted."""
        settings = self.settings
        rounding, state = Rounding(self.moments(channels), channels, grid, damping), None
        if settings.method == "adaround":
            codes = train_rounding(self.moments(channels), channels, grid, settings.schedule, damping)
        else:
            codes, state = rounding.sequential(min(self.workspace.block, channels.weight.shape[1]))
        codes = rounding.descend(codes, settings.sweeps, state)
        del state
        if not settings.refit_scale:
            return codes, grid
        refitted = self._refit(channels, grid, codes, damping)
        low, high = refitted.bounds(channels.weight)
        codes = torch.maximum(torch.minimum(codes, high), low)
        again = Rounding(self.moments(channels), channels, refitted, damping)
        return again.descend(codes, settings.sweeps), refitted

    def moments(self, channels: Channels) -> Moments:
        """What codes are fitted to: without the means, where a bias makes up for them."""
        if channels.bias is None or self.fitted.means is None:
            return self.fitted.moments
        return CenteredMoments(self.fitted.moments, self.fitted.means)

    def bias(self, channels: Channels, grid: CodeGrid, codes: Tensor) -> Tensor | None:
        """The bias that goes with codes; None where there is none."""
        shift = self._shift(channels, grid.dequantize(codes).sub_(channels.weight))
        return None if shift is None or channels.bias is None else channels.bias + shift

    def _shift(self, channels: Channels, delta: Tensor) -> Tensor | None:
        if channels.bias is None or self.fitted.means is None:
            return None
        return self.fitted.means.shift(channels, delta)

    def _refit(self, channels: Channels, grid: CodeGrid, codes: Tensor, damping: float) -> CodeGrid:
        """The factor on each row's scales that its codes would have: the least of a parabola in the factor.

        With V = scale * codes and D = f V - W the loss is smallest at f = V (W G + R) V / (V G V).
        """
        value = grid.dequantize(codes)
        moments = self.moments(channels)
        ridge = damping * float(moments.diagonal.mean())
        # Gradients at W' = V and at W' = 0 differ by V G.
        at_value = moments.full_gradient(channels, value - channels.weight)
        at_zero = moments.full_gradient(channels, -channels.weight)
        at_value.add_(value - channels.weight, alpha=ridge)
        at_zero.sub_(channels.weight, alpha=ridge)
        curvature = ((at_value - at_zero) * value).sum(1, keepdim=True)
        slope = -(at_zero * value).sum(1, keepdim=True)
        factor = torch.where(curvature > 0, slope / curvature, 1.0).clamp(0.5, 2.0)
        return replace(grid, scale=grid.scale * factor)

    def loss(self, channels: Channels, grid: CodeGrid, codes: Tensor) -> Tensor:
        """Of codes and the bias that goes with them, by channel, on the data that judge."""
        delta = grid.dequantize(codes).sub_(channels.weight)
        loss = self.judge.moments.loss(channels, delta)
        shift = self._shift(channels, delta)
        if shift is None or self.judge.means is None:
            return loss
        # E |e - s|^2 with the error's mean from the data that judge, and s from those that were fitted to.
        return loss.add_(shift * (shift - 2 * self.judge.means.shift(channels, delta))).clamp_(min=0)

    def sums(self, channels: Channels, grid: CodeGrid, nearest: Tensor, own: CodeGrid, codes: Tensor) -> Tensor:
        """Loss of the nearest codes, loss of the codes, and signal: (3,), float64."""
        by_channel = (
            self.judge.moments.loss(channels, grid.dequantize(nearest).sub_(channels.weight)),
            self.loss(channels, own, codes),
            self.judge.moments.signal(channels),
        )
        return torch.stack([values.double().sum() for values in by_channel])


def _decibels(signal: float, noise: float) -> float:
    if noise <= 0 or signal <= 0:
        return math.inf if noise <= 0 else -math.inf
    return 10 * math.log10(signal / noise)
