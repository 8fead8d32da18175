"""LoRA (Hu et al. 2021, arXiv:2106.09685): a layer plus a product of two small ones, which fusing adds to its weight.

    y = layer(x) + alpha * up(down(x))        W' = W + alpha * (up @ down)        per group of a convolution

`down` has the layer's kernel, stride and padding, `up` is 1x1; in a layer with g groups each group has its own pair.
With `bias=True` both have one: b' = b + alpha * (up.bias + up @ down.bias).
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sdconvert.errors import PluginError
from sdconvert.plugins.base import unwrap
from sdconvert.plugins.hooks import plugin_hooks
from sdconvert.plugins.single import SinglePluginBlock


class LowRank(nn.Module):
    """`up(down(x))` beside a linear layer or a convolution, zero until it is trained or loaded.

    Args:
        host: Whose shapes it takes.
        rank: Of the product, per group.
        bias: Both layers have a bias.
        dropout: Of what `down` gives, in training.
    """

    lora_down: Any
    lora_up: Any

    def __init__(self, host: nn.Linear | nn.Conv2d, rank: int, bias: bool, dropout: float) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": host.weight.device, "dtype": host.weight.dtype}
        if isinstance(host, nn.Linear):
            self.groups = 1
            self.lora_down = nn.Linear(host.in_features, rank, bias=bias, **place)
            self.lora_up = nn.Linear(rank, host.out_features, bias=bias, **place)
        else:
            self.groups = host.groups
            shared: dict[str, Any] = {"groups": host.groups, "bias": bias, **place}
            geometry: Any = (host.kernel_size, host.stride, host.padding, host.dilation)
            hidden = rank * host.groups
            conv: Any = nn.Conv2d
            self.lora_down = conv(host.in_channels, hidden, *geometry, padding_mode=host.padding_mode, **shared)
            self.lora_up = nn.Conv2d(hidden, host.out_channels, 1, **shared)
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=5**0.5)
        for parameter in (self.lora_up.weight, self.lora_up.bias):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer's output is to get more, before `alpha`."""
        output: Tensor = self.lora_up(self.dropout(self.lora_down(x)))
        return output

    def weight_delta(self) -> Tensor:
        """`up @ down` per group, (out, in / groups * kernel area)."""
        up, down = self._per_group(self.lora_up), self._per_group(self.lora_down)
        return (up @ down).flatten(0, 1)

    def bias_delta(self) -> Tensor:
        """`up.bias + up @ down.bias` per group, (out,)."""
        down: Tensor = self.lora_down.bias.reshape(self.groups, -1, 1)
        up_bias: Tensor = self.lora_up.bias
        return up_bias + (self._per_group(self.lora_up) @ down).flatten()

    def _per_group(self, layer: Any) -> Tensor:
        """A layer's weight as (groups, out / groups, in / groups * kernel area)."""
        weight: Tensor = layer.weight.flatten(1)
        return weight.reshape(self.groups, -1, weight.shape[1])


class LoraBlock(SinglePluginBlock):
    """LoRA on a linear layer or a convolution, as `lora_block_{lora_id}` on it.

    Args:
        lora_id: Tells several LoRAs on one layer apart.
        host: An `nn.Linear` or `nn.Conv2d`, of any groups.
        rank: Of the product, per group.
        dropout: Between `down` and `up`, in training.
        alpha: Weight of the product.
        bias: `down` and `up` have a bias; the layer must have one too.
        alpha_auto_scale: Divide `alpha` by the rank, as LoRA's authors do.

    Raises:
        PluginError: The layer is none of these classes, the rank is not positive, or `bias` finds no bias.
    """

    wrapable_classes: ClassVar = (nn.Linear, nn.Conv2d)

    alpha: Tensor

    def __init__(
        self,
        lora_id: str | int,
        host: nn.Module,
        rank: int = 1,
        dropout: float = 0.1,
        alpha: float = 1.0,
        bias: bool = False,
        alpha_auto_scale: bool = True,
    ) -> None:
        # A patched layer's weight is in the layer, and so is its LoRA.
        super().__init__(f"lora_block_{lora_id}", unwrap(host))
        layer = supported_layer(self.host, rank)
        if bias and layer.bias is None:
            raise PluginError(
                f"{type(layer).__name__} has no bias that `{self.name}` could be fused into",
                hint="leave out bias=True for this layer",
            )
        self.rank, self.bias = rank, bias
        self.layer = LowRank(layer, rank, bias, dropout)
        self.register_buffer("alpha", torch.tensor(alpha / rank if alpha_auto_scale else alpha))

    def forward(self, fea_in: tuple[Tensor, ...], fea_out: Tensor) -> Tensor:
        """Add the product to the layer's output."""
        output: Tensor = fea_out + self.layer(fea_in[0]) * self.alpha
        return output

    @torch.no_grad()
    def fuse_into_host(self) -> None:
        """Add the product to the layer's weight.

        Raises:
            PluginError: Another plugin changes the layer's weight, or its output before this one does.
        """
        self._require_plain_host()
        layer: Any = self.host
        layer.weight.add_((self.alpha * self.layer.weight_delta()).view_as(layer.weight))
        if self.bias:
            layer.bias.add_(self.alpha * self.layer.bias_delta())

    def _require_plain_host(self) -> None:
        """What is added behind another plugin's effect cannot be added in front of it."""
        for hook in plugin_hooks(self.host):
            if hook.plugin is self:
                return
            changes = hook.method == "_shadow" or (not hook.pre and hook.method in ("_replace_output", "_to_hook"))
            if changes and not isinstance(hook.plugin, LoraBlock):
                raise PluginError(
                    f"plugin `{self.name}` builds on plugin `{hook.plugin.name}`, on the same "
                    f"{type(self.host).__name__}",
                    hint=f"fuse or remove `{hook.plugin.name}` first",
                )


def supported_layer(host: nn.Module, rank: int) -> nn.Linear | nn.Conv2d:
    """The host, if low-rank products of that rank exist for its class.

    Raises:
        PluginError: They do not, or the rank is not positive.
    """
    if not isinstance(host, nn.Linear | nn.Conv2d):
        raise PluginError(f"there is no LoRA for a {type(host).__name__}", hint="choose Linear or Conv2d layers")
    if rank < 1:
        raise PluginError(f"rank {rank} of a LoRA is not positive", hint="use 1 or more")
    return host
