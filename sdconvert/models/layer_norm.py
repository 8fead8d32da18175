"""LayerNorm over the channels of an image: what a transformer in NCHW needs in place of a norm over the last axis."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdconvert.models.convolutions import image_transformers
from sdconvert.models.transformer_names import is_layer_norm
from sdconvert.plugins.replacement import ReplacementPatch


class ChannelLayerNorm(nn.LayerNorm):
    """A LayerNorm that takes images (b, C, H, W), and tokens (b, T, C) as the original did whose weights it has.

    The op stays LayerNorm over the last axis, the one that the HTP has: the permutations around it cancel against the
    compiler's own, for it computes channels last.
    """

    @classmethod
    def from_layer_norm(cls, norm: nn.LayerNorm) -> "ChannelLayerNorm":
        """Make one with the parameters of a LayerNorm over channels."""
        with torch.device("meta"):
            affine = norm.elementwise_affine
            channels = cls(norm.normalized_shape, norm.eps, elementwise_affine=affine, bias=norm.bias is not None)
        channels.weight, channels.bias = norm.weight, norm.bias
        return channels

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalize each pixel or token over its channels."""
        if hidden_states.ndim != 4:
            return super().forward(hidden_states)
        last = hidden_states.permute(0, 2, 3, 1)
        return functional.layer_norm(last, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class ChannelLayerNormPatch(ReplacementPatch):
    """The norms in the blocks of image transformers as `ChannelLayerNorm`.

    Raises:
        UnsupportedModelError: A norm is of another kind; `wrap_model` lists all such.
    """

    wrapable_classes: ClassVar = (nn.LayerNorm,)
    what = "a norm over channels of images"

    @classmethod
    def selects(cls, path: str, model: nn.Module) -> bool:
        """See `ReplacementPatch.selects`."""
        return is_layer_norm(path, image_transformers(model))

    @classmethod
    def reason_against(cls, layer: Any) -> str | None:
        """See `ReplacementPatch.reason_against`."""
        if isinstance(layer, ChannelLayerNorm):
            return "it is rewritten already"
        if type(layer) is not nn.LayerNorm:
            return f"it is a {type(layer).__name__}, not a LayerNorm"
        if len(layer.normalized_shape) != 1:
            return f"it normalizes over {len(layer.normalized_shape)} axes, not over channels alone"
        return None

    @classmethod
    def replace(cls, layer: nn.LayerNorm) -> ChannelLayerNorm:
        """See `ReplacementPatch.replace`."""
        return ChannelLayerNorm.from_layer_norm(layer)
