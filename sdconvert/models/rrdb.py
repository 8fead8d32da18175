"""Residual in residual dense block of ESRGAN (Wang et al. 2018, arXiv:1809.00219), with BasicSR's parameter names."""

import torch
from torch import Tensor, nn
from torch.nn import functional

_RESIDUAL_SCALE = 0.2
_NEGATIVE_SLOPE = 0.2


class ResidualDenseBlock(nn.Module):
    """Five 3x3 convolutions, each of which sees the outputs of all before it.

    Args:
        num_feat: Channels of input and output.
        num_grow_ch: Channels that each of the first four convolutions adds.
    """

    def __init__(self, num_feat: int, num_grow_ch: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_feat, num_grow_ch, 3, padding=1)
        self.conv2 = nn.Conv2d(num_feat + num_grow_ch, num_grow_ch, 3, padding=1)
        self.conv3 = nn.Conv2d(num_feat + 2 * num_grow_ch, num_grow_ch, 3, padding=1)
        self.conv4 = nn.Conv2d(num_feat + 3 * num_grow_ch, num_grow_ch, 3, padding=1)
        self.conv5 = nn.Conv2d(num_feat + 4 * num_grow_ch, num_feat, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, num_feat, h, w) to the same shape."""
        features = [x]
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            features.append(functional.leaky_relu(conv(torch.cat(features, dim=1)), _NEGATIVE_SLOPE))
        last: Tensor = self.conv5(torch.cat(features, dim=1))
        return last * _RESIDUAL_SCALE + x


class RRDB(nn.Module):
    """Three residual dense blocks inside one more residual connection.

    Args:
        num_feat: Channels of input and output.
        num_grow_ch: Growth of the dense blocks.
    """

    def __init__(self, num_feat: int, num_grow_ch: int) -> None:
        super().__init__()
        self.rdb1 = ResidualDenseBlock(num_feat, num_grow_ch)
        self.rdb2 = ResidualDenseBlock(num_feat, num_grow_ch)
        self.rdb3 = ResidualDenseBlock(num_feat, num_grow_ch)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, num_feat, h, w) to the same shape."""
        last: Tensor = self.rdb3(self.rdb2(self.rdb1(x)))
        return last * _RESIDUAL_SCALE + x
