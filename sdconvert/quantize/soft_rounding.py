"""AdaRound's soft rounding of weights (Nagel et al., "Up or Down? Adaptive Rounding", 2020, arXiv:2004.10568)."""

import torch
from torch import Tensor, nn

from sdconvert.plugins import SinglePluginBlock
from sdconvert.quantize.grid import WeightGrid

ZETA, GAMMA = 1.1, -0.1
"""The sigmoid is stretched beyond [0, 1] and cut off, so that 0 and 1 are reached and keep no gradient (eq. 23)."""


class SoftRoundingBlock(SinglePluginBlock):
    """Has a layer compute with a weight between the two neighbours that each value has on a grid.

        w = scale * clip(floor(w / scale) + h(alpha), lowest, highest)        eq. 22
        h(alpha) = clip(sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)        eq. 23

    `alpha` begins where the layer computes with its own weight, and is what an optimizer trains, with `regularizer`
    to drive each h to 0 or 1. `fuse` puts the weight on the grid: h at or above one half rounds up.

    Args:
        name: Of the plugin on its host.
        host: The layer.
        grid: Of the weight, per tensor or per channel.
        hook_param: The weight's name.
    """

    def __init__(self, name: str, host: nn.Module, grid: WeightGrid, hook_param: str = "weight") -> None:
        super().__init__(name, host, hook_param)
        self.grid = grid
        self.hard = False
        steps = grid.to_steps(getattr(self.host, hook_param).detach())
        fraction = (steps - steps.floor() - GAMMA) / (ZETA - GAMMA)
        self.alpha = nn.Parameter(torch.logit(fraction))

    def forward(self, host_param: Tensor) -> Tensor:
        """The weight with soft rounding, or while `hard` is set with the rounding that `fuse` makes permanent."""
        up = (self.alpha >= 0).to(host_param.dtype) if self.hard else self.rounding()
        return self.grid.from_steps(self.grid.to_steps(host_param.detach()).floor() + up)

    def rounding(self) -> Tensor:
        """h(alpha), in the weight's shape: 0 rounds down, 1 up."""
        return (torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def regularizer(self, beta: float) -> Tensor:
        """The sum of 1 - |2 h - 1|^beta: zero when every value is decided; a small beta pushes hard (eq. 24)."""
        total: Tensor = (1 - (2 * self.rounding() - 1).abs().pow(beta)).sum()
        return total

    def fuse_into_host(self) -> None:
        """Put the weight on the grid for good."""
        self.hard = True
        super().fuse_into_host()
