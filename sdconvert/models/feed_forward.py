"""Gated feed-forwards as two 1x1 convolutions, without the split of a tensor of twice the width.

GEGLU (Shazeer 2020, arXiv:2002.05202)        GatedConv2d
hidden, gate = chunk(proj(x))                 hidden = proj_convs.0(x)      rows 0 … n of proj
hidden * gelu(gate)                           hidden * gelu(proj_convs.1(x))     rows n … 2n
"""

from collections.abc import Callable
from typing import Any, ClassVar

from diffusers.models.activations import GEGLU, SwiGLU
from torch import Tensor, nn
from torch.nn import functional

from sdconvert.models.convolutions import GATED, image_transformers, reason_against_linear, rows_of
from sdconvert.models.transformer_names import is_feed_forward_entry
from sdconvert.plugins.replacement import ReplacementPatch

_ACTIVATIONS: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {GEGLU: functional.gelu, SwiGLU: functional.silu}


class GatedConv2d(nn.Module):
    """hidden * activation(gate), both computed by 1x1 convolutions of images (b, C, H, W) or tokens (b, T, C).

    Args:
        gated: A feed-forward's first layer, GEGLU or SwiGLU.
    """

    def __init__(self, gated: Any) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[type(gated)]
        rows = gated.proj.weight.shape[0]
        self.proj_convs = nn.ModuleList([rows_of(gated.proj, 0, rows // 2), rows_of(gated.proj, rows // 2, rows)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(b, C, H, W) -> (b, n, H, W), or (b, T, C) -> (b, T, n)."""
        hidden, gate = (conv(hidden_states) for conv in self.proj_convs)
        output: Tensor = hidden * self.activation(gate)
        return output


class GatedConv2dPatch(ReplacementPatch):
    """GEGLU and SwiGLU of image transformers as two 1x1 convolutions.

    Raises:
        UnsupportedModelError: The projection is more than its weight; `wrap_model` lists all such.
    """

    wrapable_classes: ClassVar = GATED
    what = "two 1x1 convolutions"

    @classmethod
    def selects(cls, path: str, model: nn.Module) -> bool:
        """See `ReplacementPatch.selects`."""
        return is_feed_forward_entry(path, image_transformers(model))

    @classmethod
    def reason_against(cls, layer: Any) -> str | None:
        """See `ReplacementPatch.reason_against`."""
        if type(layer) not in _ACTIVATIONS:
            return f"its class {type(layer).__name__} may compute something else than its ancestor"
        reason = reason_against_linear(layer.proj)
        return f"its proj: {reason}" if reason else None

    @classmethod
    def replace(cls, layer: Any) -> GatedConv2d:
        """See `ReplacementPatch.replace`."""
        return GatedConv2d(layer)
