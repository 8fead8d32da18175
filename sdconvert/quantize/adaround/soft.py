"""AdaRound's own optimisation, on the moments: Adam on the soft rounding, full batch.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020, with AIMET's schedule: no
regulariser in the first fifth of the steps, then beta from 20 to 2 along half a cosine.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdconvert.quantize.adaround.code_grid import CodeGrid
from sdconvert.quantize.adaround.moments import Channels, Moments
from sdconvert.quantize.soft_rounding import SoftRoundingBlock


@dataclass(frozen=True)
class Schedule:
    """How soft rounding is trained.

    Attributes:
        iterations: Steps of Adam.
        learning_rate: Of Adam. AIMET's 0.001 moves little in a few hundred steps.
        regularization: Weight of the regulariser.
        warm_start: Part of the steps without regulariser.
        beta: Its exponent when it sets in, and at the end.
    """

    iterations: int = 400
    learning_rate: float = 0.03
    regularization: float = 0.01
    warm_start: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)

    def beta_at(self, iteration: int) -> float | None:
        """The exponent of a step; None while there is no regulariser."""
        first = self.warm_start * self.iterations
        if iteration < first:
            return None
        part = (iteration - first) / (self.iterations - first)
        start, end = self.beta
        return end + 0.5 * (start - end) * (1 + math.cos(math.pi * part))


def train_rounding(moments: Moments, channels: Channels, grid: CodeGrid, schedule: Schedule, damping: float) -> Tensor:
    """Train the rounding of some output channels.

    Args:
        moments: Of the layer's input.
        channels: To be rounded.
        grid: Of these channels.
        schedule: Of the training.
        damping: As for `Rounding`.

    Returns:
        Codes (rows, columns).
    """
    weight = channels.weight
    host = nn.Module()
    host.weight = nn.Parameter(weight.reshape(grid.scale.numel(), -1).clone(), requires_grad=False)
    block = SoftRoundingBlock("adaround", host, grid.weight_grid())
    optimizer = torch.optim.Adam([block.alpha], lr=schedule.learning_rate, fused=True)
    ridge = damping * float(moments.diagonal.mean())
    low, high = grid.bounds(weight)
    below = grid.dequantize(low) - weight
    step = grid.dequantize(high - low)  # none where the grid ends
    for iteration in range(schedule.iterations):
        with torch.enable_grad():
            rounding = block.rounding()
        # The loss is quadratic: its derivative by the rounding needs no autograd.
        up = rounding.detach().reshape(weight.shape)
        delta = torch.addcmul(below, up, step)
        gradient = moments.full_gradient(channels, delta).add_(delta, alpha=ridge).mul_(step).mul_(2)
        beta = schedule.beta_at(iteration)
        if beta is not None and schedule.regularization:
            undecided = 2 * up - 1
            slope = undecided.abs().pow_(beta - 1).copysign_(undecided)
            gradient.sub_(slope, alpha=2 * beta * schedule.regularization)
        (block.alpha.grad,) = torch.autograd.grad(rounding, block.alpha, gradient.reshape(rounding.shape))
        optimizer.step()
    block.hard = True
    rounded = block(host.weight).detach().reshape(weight.shape)
    block.remove()
    codes: Tensor = (rounded / grid.column_scale(weight.shape[1])).round()
    return codes
