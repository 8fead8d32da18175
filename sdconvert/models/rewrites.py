"""The rewrites beside attention per head, by the names that a recipe and the command line use, in the order of use."""

from collections.abc import Callable, Iterable

from torch import nn

from sdconvert.models.convolutions import LinearToConv2dPatch
from sdconvert.models.feed_forward import GatedConv2dPatch
from sdconvert.models.layer_norm import ChannelLayerNormPatch
from sdconvert.models.pixel_attention import take_pixels_as_images
from sdconvert.models.rewrite_names import REWRITES, require_rewrites
from sdconvert.models.transformer_2d import ImageTransformer2DPatch
from sdconvert.plugins.replacement import ReplacementPatch


def apply_rewrites(model: nn.Module, names: Iterable[str] = REWRITES) -> dict[str, int]:
    """Rewrite a model for good, its attention being per head already; what it computes stays the same.

    Args:
        model: A UNet or ControlNet; its own plugins stay.
        names: Of the rewrites.

    Returns:
        Number of layers that each rewrite has changed, 0 where the model has none of its kind.

    Raises:
        UsageError: There is no rewrite of a name, or one needs another that is not asked for.
        UnsupportedModelError: A layer cannot be rewritten; the message lists all such. Rewrites before it are done.
    """
    return {name: _APPLY[name](model) for name in require_rewrites(names)}


def _fused(patch: type[ReplacementPatch]) -> Callable[[nn.Module], int]:
    def apply(model: nn.Module) -> int:
        if not patch.concerns(model):
            return 0
        group = patch.wrap_model("rewrite", model)
        group.fuse()
        return len(group)

    return apply


_APPLY: dict[str, Callable[[nn.Module], int]] = {
    "linear_to_conv2d": _fused(LinearToConv2dPatch),
    "gated_conv2d": _fused(GatedConv2dPatch),
    "channel_layer_norm": _fused(ChannelLayerNormPatch),
    "image_transformer": _fused(ImageTransformer2DPatch),
    "image_context": take_pixels_as_images,
}
