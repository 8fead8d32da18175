"""Linear layers of transformers as 1x1 convolutions, which the HTP runs on images without moving a value.

A 1x1 convolution over (b, C, H, W) is a matrix product at each pixel:

    Linear                       PointwiseConv2d
    weight (rows, C)             weight (rows, C, 1, 1)        the same numbers
    (b, T, C) -> (b, T, rows)    (b, C, H, W) -> (b, rows, H, W), or tokens as before
"""

from typing import Any, ClassVar

import torch
from diffusers.models.activations import GEGLU, SwiGLU
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from sdconvert.models.image_layout import image_to_tokens, tokens_to_image
from sdconvert.models.transformer_names import is_linear
from sdconvert.plugins.base import unwrap
from sdconvert.plugins.replacement import ReplacementPatch
from sdconvert.plugins.selectors import iter_layers

GATED = (GEGLU, SwiGLU)
"""First layers of feed-forwards that multiply one half of their projection by an activation of the other."""


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution that takes images (b, C, H, W), and tokens (b, T, C) as the Linear did whose weights it has."""

    @classmethod
    def from_rows(cls, weight: Tensor, bias: Tensor | None, *, trainable: bool = True) -> "PointwiseConv2d":
        """Make one of a matrix (rows, C) and its bias (rows,); its parameters are views of them."""
        rows, columns = weight.shape
        conv = cls(columns, rows, 1, bias=bias is not None, device="meta")
        conv.weight = nn.Parameter(weight.detach()[:, :, None, None], requires_grad=trainable)
        if bias is not None:
            conv.bias = nn.Parameter(bias.detach(), requires_grad=trainable)
        return conv

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(b, C, H, W) -> (b, rows, H, W), or (b, T, C) -> (b, T, rows)."""
        if hidden_states.ndim == 4:
            return super().forward(hidden_states)
        return image_to_tokens(super().forward(tokens_to_image(hidden_states)))


class LinearToConv2dPatch(ReplacementPatch):
    """Projections of image transformers as 1x1 convolutions: `proj_in`, `proj_out`, `to_out.0`, the feed-forward's.

    The first of a gated feed-forward is left to `GatedConv2dPatch`; those to q, k and v are `SHAAttentionPatch`'s.

    Raises:
        UnsupportedModelError: A projection is more than its weight; `wrap_model` lists all such.
    """

    wrapable_classes: ClassVar = (nn.Linear,)
    what = "a 1x1 convolution"

    @classmethod
    def selects(cls, path: str, model: nn.Module) -> bool:
        """See `ReplacementPatch.selects`."""
        entry, _, name = path.rpartition(".")
        gated = name == "proj" and isinstance(unwrap(model.get_submodule(entry)), GATED)
        return not gated and is_linear(path, image_transformers(model))

    @classmethod
    def reason_against(cls, layer: nn.Linear) -> str | None:
        """See `ReplacementPatch.reason_against`."""
        return reason_against_linear(layer)

    @classmethod
    def replace(cls, layer: nn.Linear) -> PointwiseConv2d:
        """See `ReplacementPatch.replace`."""
        return PointwiseConv2d.from_rows(layer.weight, layer.bias, trainable=layer.weight.requires_grad)


def image_transformers(model: nn.Module) -> list[str]:
    """Paths of the transformers over images of a model."""
    layers = ((path, unwrap(module)) for path, module in iter_layers(model))
    return [path for path, layer in layers if isinstance(layer, Transformer2DModel) and layer.is_input_continuous]


def reason_against_linear(linear: Any) -> str | None:
    """A layer that is more than a Linear's weight and bias: views of them would lose the rest."""
    if type(linear) is not nn.Linear:
        return f"it is a {type(linear).__name__}, not a Linear"
    if linear._forward_hooks or linear._forward_pre_hooks:
        return "it carries a hook or a plugin; fuse or remove it first"
    return None


def rows_of(linear: nn.Linear, start: int, stop: int) -> PointwiseConv2d:
    """A 1x1 convolution of rows `start` to `stop` of a Linear."""
    with torch.no_grad():
        bias = None if linear.bias is None else linear.bias[start:stop]
        return PointwiseConv2d.from_rows(linear.weight[start:stop], bias, trainable=linear.weight.requires_grad)
