"""Ranges: plugins on each stored tensor take note of the extremes and the spread that calibration shows them."""

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


class HistogramBlock(SinglePluginBlock):
    """Counts the values that leave a layer, over all calls; nothing is changed.

    The bins are laid out beforehand, so that counts of parts of the data are added exactly.

    Args:
        name: Of the plugin on its host.
        host: The layer.
        extremes: Lowest and highest value that will come, (2,), and these different.
        bins: Number of equal bins between them.

    Attributes:
        counts: Of each bin, (bins,), float64.
    """

    def __init__(self, name: str, host: nn.Module, extremes: Tensor, bins: int) -> None:
        super().__init__(name, host)
        self.extremes = extremes
        self.counts = torch.zeros(bins, dtype=torch.float64)

    def forward(self, fea_in: tuple[Any, ...], fea_out: Tensor) -> None:
        """Count what the layer returns."""
        low, high = self.extremes.tolist()
        self.counts += torch.histc(fea_out.detach().as_subclass(Tensor), len(self.counts), low, high)
