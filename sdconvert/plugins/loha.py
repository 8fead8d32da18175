"""LoHa (Hyeon-Woo et al. 2022, arXiv:2108.06098): a weight plus the Hadamard product of two low-rank ones.

    W' = W + alpha * (w1_a @ w1_b) * (w2_a @ w2_b)

With factors of rank r the product has a rank of up to r².
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from sdconvert.plugins.lora import supported_layer
from sdconvert.plugins.single import SinglePluginBlock


class LohaBlock(SinglePluginBlock):
    """LoHa on a linear layer or a convolution.

    The plugin stands in for the layer's `weight`, as `lora_block_{lora_id}` on it.

    Args:
        lora_id: Tells several on one layer apart.
        host: An `nn.Linear` or `nn.Conv2d`, of any groups.
        rank: Of each of the two factors.
        dropout: Of the product, in training.
        alpha: Weight of the product.
        alpha_auto_scale: Divide `alpha` by the rank.

    Raises:
        PluginError: The layer is none of these classes, or the rank is not positive.
    """

    wrapable_classes: ClassVar = (nn.Linear, nn.Conv2d)

    alpha: Tensor
    hada_w1_a: Tensor
    hada_w1_b: Tensor
    hada_w2_a: Tensor
    hada_w2_b: Tensor

    def __init__(
        self,
        lora_id: str | int,
        host: nn.Module,
        rank: int = 1,
        dropout: float = 0.1,
        alpha: float = 1.0,
        alpha_auto_scale: bool = True,
    ) -> None:
        super().__init__(f"lora_block_{lora_id}", host, hook_param="weight")
        weight = supported_layer(self.host, rank).weight.detach().flatten(1)
        for factor, first in ((1, 0.1), (2, 0.0)):  # LyCORIS' names and scales: the product begins at zero
            for name, shape, std in (("a", (len(weight), rank), first), ("b", (rank, weight.shape[1]), 1.0)):
                self.register_parameter(f"hada_w{factor}_{name}", nn.Parameter(weight.new_empty(shape).normal_(0, std)))
        self.rank = rank
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("alpha", torch.tensor(alpha / rank if alpha_auto_scale else alpha))

    def forward(self, host_param: Tensor) -> Tensor:
        """The weight with the product added to it."""
        product: Tensor = (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b)
        value: Tensor = host_param + self.alpha * self.dropout(product).view_as(host_param)
        return value

    def fuse_into_host(self) -> None:
        """Make the weight's present value permanent, without dropout."""
        mode = self.training
        try:
            self.eval()
            super().fuse_into_host()
        finally:
            self.train(mode)
