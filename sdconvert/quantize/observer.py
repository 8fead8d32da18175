"""Ranges: a plugin on each stored tensor takes note of the extremes that calibration shows it."""

from typing import Any

import torch
from torch import Tensor, nn

from sdconvert.plugins import SinglePluginBlock


class ObserverBlock(SinglePluginBlock):
    """Takes note of the range of what leaves a layer, over all calls; nothing is changed.

    Attributes:
        extremes: Lowest and highest value so far, (2,); None before the first call. NaN once there was one.
    """

    def __init__(self, name: str, host: nn.Module) -> None:
        super().__init__(name, host)
        self.extremes: Tensor | None = None

    def forward(self, fea_in: tuple[Any, ...], fea_out: Tensor) -> None:
        """Widen the range to what the layer returns."""
        low, high = fea_out.detach().as_subclass(Tensor).aminmax()
        if self.extremes is not None:
            low, high = torch.minimum(low, self.extremes[0]), torch.maximum(high, self.extremes[1])
        self.extremes = torch.stack([low, high])
