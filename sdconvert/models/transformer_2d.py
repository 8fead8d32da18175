"""diffusers' `Transformer2DModel` in NCHW from its first layer to its last.

    diffusers                                            here
    (b, C, H, W) -> norm -> proj_in                      (b, C, H, W) -> norm -> proj_in
      | permute, reshape                                   | the pixels in one row
    (b, H*W, C) -> transformer_blocks                    (b, C, 1, H*W) -> transformer_blocks
      | reshape, permute                                   | in rows again
    (b, C, H, W) -> proj_out -> + input                  (b, C, H, W) -> proj_out -> + input

The layers in the blocks must take images, which other rewrites give them.
"""

from typing import Any, ClassVar, TypeVar

from diffusers.models.activations import GELU, ApproximateGELU, LinearActivation
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from sdconvert.models.convolutions import PointwiseConv2d
from sdconvert.models.feed_forward import GatedConv2d
from sdconvert.models.image_layout import in_one_row, in_rows
from sdconvert.models.layer_norm import ChannelLayerNorm
from sdconvert.models.sha import SHAAttention
from sdconvert.plugins.base import unwrap
from sdconvert.plugins.replacement import ReplacementPatch

Kind = TypeVar("Kind", bound=nn.Module)

_ACTIVATED = (GELU, ApproximateGELU, LinearActivation)
# What a block's children must be, and the rewrite that makes them so.
_TAKES_IMAGES: dict[str, tuple[type[nn.Module], str]] = {
    "norm": (ChannelLayerNorm, "ChannelLayerNormPatch"),
    "attn": (SHAAttention, "SHAAttentionPatch"),
}


class ImageTransformerBlock(BasicTransformerBlock):
    """A block whose layers all take images: norms, attention and feed-forward, each added to what entered it."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Any = None,
        added_cond_kwargs: Any = None,
    ) -> Tensor:
        """Run the block on an image (b, C, 1, T); arguments and names are diffusers'.

        `encoder_hidden_states` is what `attn2` attends to: tokens (b, Tk, C') or an image (b, C', H, W).
        """
        kwargs = cross_attention_kwargs or {}
        context = encoder_hidden_states if self.only_cross_attention else None
        normalized = self.norm1(hidden_states)
        attended = self.attn1(normalized, encoder_hidden_states=context, attention_mask=attention_mask, **kwargs)
        hidden_states = attended + hidden_states
        if self.attn2 is not None:
            normalized = self.norm2(hidden_states)
            context, mask = encoder_hidden_states, encoder_attention_mask
            attended = self.attn2(normalized, encoder_hidden_states=context, attention_mask=mask, **kwargs)
            hidden_states = attended + hidden_states
        output: Tensor = self.ff(self.norm3(hidden_states)) + hidden_states
        return output


class ImageTransformer2DModel(Transformer2DModel):
    """A transformer over images whose blocks run on images."""

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        projected = self.proj_in(self.norm(hidden_states))
        return in_one_row(projected), projected.shape[1]

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        output: Tensor = self.proj_out(in_rows(hidden_states, height)) + residual
        return output


class ImageTransformer2DPatch(ReplacementPatch):
    """Transformers over images in NCHW, after the layers of their blocks have learned to take images.

    Raises:
        UnsupportedModelError: A transformer is of another kind, or a layer takes no images yet; `wrap_model` lists all.
    """

    wrapable_classes: ClassVar = (Transformer2DModel,)
    what = "a transformer in NCHW"
    way_out = "apply the rewrites that they name first, or leave them out with exclude_key="

    @classmethod
    def reason_against(cls, layer: Any) -> str | None:
        """See `ReplacementPatch.reason_against`."""
        if isinstance(layer, ImageTransformer2DModel):
            return "it is rewritten already"
        if type(layer) is not Transformer2DModel:
            return f"its class {type(layer).__name__} may compute something else than its ancestor"
        if not layer.is_input_continuous:
            return "it takes patches or classes of pixels, not images"
        reasons = [_needs(layer, name, nn.Conv2d, "LinearToConv2dPatch") for name in ("proj_in", "proj_out")]
        reasons += [_reason_against_block(block) for block in layer.transformer_blocks]
        return next((reason for reason in reasons if reason), None)

    @classmethod
    def replace(cls, layer: Any) -> ImageTransformer2DModel:
        """See `ReplacementPatch.replace`."""
        transformer: ImageTransformer2DModel = _with_parts_of(layer, ImageTransformer2DModel)
        blocks = [_with_parts_of(block, ImageTransformerBlock) for block in layer.transformer_blocks]
        transformer.transformer_blocks = nn.ModuleList(blocks)
        return transformer


def _reason_against_block(block: Any) -> str | None:
    if type(block) is not BasicTransformerBlock:
        return f"a block is a {type(block).__name__}"
    if block.norm_type != "layer_norm":
        return f"its norms are modulated ({block.norm_type})"
    if block.pos_embed is not None or hasattr(block, "fuser"):
        return "its blocks embed positions or attend to further objects (GLIGEN)"
    if block._chunk_size is not None:
        return "its feed-forward runs in chunks: call disable_forward_chunking()"
    for name, _ in block.named_children():
        kind, patch = _TAKES_IMAGES.get(name[:4], (nn.Module, ""))
        if reason := _needs(block, name, kind, patch):
            return reason
    return _reason_against_feed_forward(block.ff)


def _reason_against_feed_forward(ff: Any) -> str | None:
    if type(ff) is not FeedForward:
        return f"its feed-forward is a {type(ff).__name__}"
    entry, *rest = (unwrap(layer) for layer in ff.net)
    if type(entry) in _ACTIVATED:
        return _needs(entry, "proj", PointwiseConv2d, "LinearToConv2dPatch") or _reason_against_rest(rest)
    if not isinstance(entry, GatedConv2d):
        return f"the {type(entry).__name__} of its feed-forward takes no images: apply GatedConv2dPatch first"
    return _reason_against_rest(rest)


def _reason_against_rest(layers: list[nn.Module]) -> str | None:
    others = [layer for layer in layers if not isinstance(layer, PointwiseConv2d | nn.Dropout)]
    if others:
        return f"the {type(others[0]).__name__} of its feed-forward takes no images: apply LinearToConv2dPatch first"
    return None


def _needs(parent: Any, name: str, kind: type[nn.Module], patch: str) -> str | None:
    child = unwrap(parent.get_submodule(name))
    return None if isinstance(child, kind) else f"`{name}` is a {type(child).__name__}: apply {patch} first"


def _with_parts_of(module: Any, cls: type[Kind]) -> Kind:
    """A module of another class with the same attributes, children and parameters; hooks stay behind."""
    other: Kind = cls.__new__(cls)
    nn.Module.__init__(other)
    own = set(vars(other))
    other.__dict__.update({name: value for name, value in vars(module).items() if name not in own})
    for kind in ("_parameters", "_buffers", "_modules"):
        vars(other)[kind].update(vars(module)[kind])
    other.training = module.training
    return other
