"""PASD's pixel-aware cross attention (Yang et al. 2023, arXiv:2308.14469) as plugins on a stock diffusers UNet.

The UNet's decoder attends to what the ControlNet saw. Its keys and values are the raw residuals of the ControlNet, the
same that are added to the skip connections, last one first: with N resnets in the up path, resnet n of the path gets
residual N - 1 - n, of the same height and width as its output.

    full                                        light (only in up blocks with text attention)
    x = resnet(x)                               x = resnet(x)
    x = text_transformer(x, text)               inside the text transformer, after the attention to the text:
    x = pixel_transformer(x, pixels)              h = h + attn2_plus(norm2_plus(h), proj_in_plus(pixels))
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from sdconvert.errors import PluginError, UnsupportedModelError
from sdconvert.models.image_layout import in_one_row_by_columns
from sdconvert.models.sha import SHAAttention
from sdconvert.plugins import MultiPluginBlock, match_layers

_RESIDUALS = "down_block_additional_residuals"
_MID_RESIDUAL = "mid_block_additional_residual"
_UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
_ATTENDS_TO_PIXELS = re.compile(r"pixel_attentions\.\d+\.transformer_blocks\.\d+\.attn2$|\.attn2_plus$")


@dataclass(frozen=True)
class _Step:
    """One resnet of the up path, and the pixels that follow it.

    Attributes:
        block: Index of the up block.
        layer: Index of the resnet in it.
        residual: Index of the ControlNet's residual.
        channels: Of the resnet's output.
        pixel_channels: Of the residual.
        heads: Of the attention.
        has_text: A text transformer follows the resnet.
    """

    block: int
    layer: int
    residual: int
    channels: int
    pixel_channels: int
    heads: int
    has_text: bool


class PixelPlugin(MultiPluginBlock):
    """What both variants share: the residuals of the present call, by step of the up path.

    Attributes:
        image_context: Whether attention takes the residuals as images (b, c, 1, pixels), not as tokens (b, pixels, c).
    """

    host_model: UNet2DConditionModel

    def __init__(self, name: str, host_model: UNet2DConditionModel, sources: list[str], targets: list[str]) -> None:
        sources = ["pre_hook:", *sources]
        super().__init__(name, match_layers(sources, host_model), match_layers(targets, host_model))
        self.residuals: tuple[Tensor, ...] = ()
        self.image_context = False

    def attentions(self) -> list[nn.Module]:
        """The layers that attend to pixels."""
        paths = [path for path, _ in self.host_model.named_modules() if _ATTENDS_TO_PIXELS.search(path)]
        return [self.host_model.get_submodule(path) for path in paths]

    def from_layer_hook(
        self, host: nn.Module, fea_in: tuple[Any, ...], fea_out: Any, idx: int, fea_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Keep the ControlNet's residuals that the UNet is called with.

        Raises:
            PluginError: The UNet is called without them, or with another number of them.
        """
        bound = inspect.signature(self.host_model.forward).bind_partial(*fea_in, **(fea_kwargs or {})).arguments
        if bound.get(_RESIDUALS) is None or bound.get(_MID_RESIDUAL) is None:
            raise PluginError(
                "a PASD UNet cannot run without the residuals of its ControlNet",
                hint=f"_, down, mid = controlnet(...); unet(..., {_RESIDUALS}=down, {_MID_RESIDUAL}=mid)",
            )
        self.residuals = tuple(bound[_RESIDUALS])
        expected = _skips(self.host_model)
        if len(self.residuals) != expected:
            raise PluginError(
                f"the UNet has {expected} skip connections but got {len(self.residuals)} residuals",
                hint="run it with the ControlNet of the same checkpoint",
            )


class PixelAttentionPlugin(PixelPlugin):
    """Full PASD: a pixel transformer after each layer of each up block, as `up_blocks.{i}.pixel_attentions.{j}`.

    Args:
        name: Of the plugin on the UNet.
        host_model: A stock UNet made of `UpBlock2D` and `CrossAttnUpBlock2D`.

    Raises:
        UnsupportedModelError: It has other up blocks, or widths that PASD's layout cannot have.
    """

    def __init__(self, name: str, host_model: UNet2DConditionModel) -> None:
        steps = list(_steps(host_model))
        layers = [f"up_blocks.{s.block}.{'attentions' if s.has_text else 'resnets'}.{s.layer}" for s in steps]
        super().__init__(name, host_model, [], layers)
        self.steps = steps
        for index, block in enumerate(host_model.up_blocks):
            transformers = [_transformer(host_model, step) for step in self.steps if step.block == index]
            self._graft(block, "pixel_attentions", nn.ModuleList(transformers))

    def to_layer_hook(self, host: nn.Module, fea_in: tuple[Any, ...], fea_out: Any, idx: int) -> Any:
        """Run the pixel transformer on what the layer returns: (b, c, h, w), or a tuple of it."""
        step = self.steps[idx]
        transformer = self.host_model.get_submodule(f"up_blocks.{step.block}.pixel_attentions.{step.layer}")
        hidden = fea_out[0] if step.has_text else fea_out
        residual = self.residuals[step.residual]
        pixels = in_one_row_by_columns(residual) if self.image_context else _tokens(residual)
        (hidden,) = transformer(hidden, encoder_hidden_states=pixels, return_dict=False)
        return (hidden,) if step.has_text else hidden


class LightPixelAttentionPlugin(PixelPlugin):
    """Light PASD: attention to pixels inside the text transformers `up_blocks.{i}.attentions.{j}`.

    It adds `proj_in_plus` to the transformer, and `norm2_plus` and `attn2_plus` to each of its blocks.

    Args:
        name: Of the plugin on the UNet.
        host_model: A stock UNet made of `UpBlock2D` and `CrossAttnUpBlock2D`.

    Raises:
        UnsupportedModelError: It has other up blocks.
    """

    def __init__(self, name: str, host_model: UNet2DConditionModel) -> None:
        steps = [step for step in _steps(host_model) if step.has_text]
        blocks = [
            (step, f"up_blocks.{step.block}.attentions.{step.layer}.transformer_blocks.{index}")
            for step in steps
            for index in range(len(_text_transformer(host_model, step).transformer_blocks))
        ]
        # The residual stream between the attention to the text and the feed-forward is no module's input or output:
        # what enters norm2 plus what leaves attn2 is it, and what is added to attn2's output is added to it.
        paths = [path for _, path in blocks]
        super().__init__(name, host_model, [f"{p}.norm2" for p in paths], [f"{p}.attn2" for p in paths])
        self.blocks = blocks
        self.streams: dict[int, Tensor] = {}
        for step in steps:
            self._graft(_text_transformer(host_model, step), "proj_in_plus", _projection(host_model, step))
        for step, path in blocks:
            block = host_model.get_submodule(path)
            self._graft(block, "norm2_plus", nn.LayerNorm(step.channels))
            self._graft(block, "attn2_plus", _attention(host_model, step))

    def from_layer_hook(
        self, host: nn.Module, fea_in: tuple[Any, ...], fea_out: Any, idx: int, fea_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Keep the residuals, and the residual stream (b, tokens, c) before each attention to the text."""
        if idx == 0:
            super().from_layer_hook(host, fea_in, fea_out, idx, fea_kwargs)
        else:
            self.streams[idx - 1] = fea_in[0]

    def to_layer_hook(self, host: nn.Module, fea_in: tuple[Any, ...], fea_out: Any, idx: int) -> Any:
        """Add the attention to the pixels to the attention to the text, (b, tokens, c)."""
        step, path = self.blocks[idx]
        block: Any = self.host_model.get_submodule(path)
        pixels = self._pixels(step)
        stream = fea_out + self.streams.pop(idx)
        return fea_out + block.attn2_plus(block.norm2_plus(stream), encoder_hidden_states=pixels)

    def _pixels(self, step: _Step) -> Tensor:
        residual = self.residuals[step.residual]
        project = _text_transformer(self.host_model, step).proj_in_plus
        if not isinstance(project, nn.Conv2d):
            residual = _tokens(residual)
        pixels: Tensor = project(residual)
        return _tokens(pixels) if pixels.ndim == 4 and not self.image_context else pixels


def take_pixels_as_images(model: nn.Module) -> int:
    """Have attention per head take K and V from the ControlNet's residuals as images.

    Returns:
        Number of layers that attend to pixels, 0 for a model without PASD's plugin.

    Raises:
        UnsupportedModelError: One of them is not per head yet, and takes tokens only.
    """
    count = 0
    for plugin in [module for module in model.modules() if isinstance(module, PixelPlugin)]:
        attentions = plugin.attentions()
        if others := [layer for layer in attentions if not isinstance(layer, SHAAttention)]:
            raise UnsupportedModelError(
                f"{len(others)} of {len(attentions)} layers that attend to pixels take tokens only, the first is a "
                f"{type(others[0]).__name__}",
                hint="rewrite attention per head first, and fuse it",
            )
        plugin.image_context = True
        count += len(attentions)
    return count


def _steps(unet: UNet2DConditionModel) -> Iterator[_Step]:
    config: Any = unet.config
    names = [type(block).__name__ for block in unet.up_blocks]
    if foreign := sorted(set(names) - set(_UP_BLOCKS)):
        raise UnsupportedModelError(
            f"PASD has no pixel attention for {', '.join(foreign)}", hint=f"use up blocks {', '.join(_UP_BLOCKS)}"
        )
    widths = list(reversed(config.block_out_channels))
    # Despite its name, attention_head_dim is the number of heads in every UNet that lacks num_attention_heads.
    heads = config.num_attention_heads or config.attention_head_dim
    residual = _skips(unet)
    for index, block in enumerate(unet.up_blocks):
        layers = _count_resnets(block)
        for layer in range(layers):
            residual -= 1
            yield _Step(
                block=index,
                layer=layer,
                residual=residual,
                channels=widths[index],
                pixel_channels=widths[min(index + (layer == layers - 1), len(widths) - 1)],
                heads=_per_block(unet, heads, index),
                has_text=names[index] == "CrossAttnUpBlock2D",
            )


def _count_resnets(block: Any) -> int:
    return len(block.resnets)


def _skips(unet: UNet2DConditionModel) -> int:
    return sum(map(_count_resnets, unet.up_blocks))


def _transformer(unet: UNet2DConditionModel, step: _Step) -> Transformer2DModel:
    config: Any = unet.config
    transformer: Transformer2DModel = Transformer2DModel(
        step.heads,
        step.channels // step.heads,
        in_channels=step.channels,
        num_layers=_per_block(unet, config.transformer_layers_per_block, step.block),
        cross_attention_dim=step.pixel_channels,
        norm_num_groups=config.norm_num_groups,
        use_linear_projection=config.use_linear_projection,
        only_cross_attention=_per_block(unet, config.only_cross_attention, step.block),
        upcast_attention=config.upcast_attention,
    )
    return transformer


def _attention(unet: UNet2DConditionModel, step: _Step) -> Attention:
    return Attention(
        query_dim=step.channels,
        cross_attention_dim=step.pixel_channels,
        heads=step.heads,
        dim_head=step.channels // step.heads,
        upcast_attention=unet.config["upcast_attention"],
    )


def _projection(unet: UNet2DConditionModel, step: _Step) -> nn.Module:
    if unet.config["use_linear_projection"]:
        return nn.Linear(step.pixel_channels, step.pixel_channels)
    return nn.Conv2d(step.pixel_channels, step.pixel_channels, 1)


def _per_block(unet: UNet2DConditionModel, value: Any, block: int) -> Any:
    """A config value for one up block; sequences go from the outermost down block inwards."""
    return value[len(unet.up_blocks) - 1 - block] if isinstance(value, list | tuple) else value


def _text_transformer(unet: UNet2DConditionModel, step: _Step) -> Any:
    return unet.get_submodule(f"up_blocks.{step.block}.attentions.{step.layer}")


def _tokens(image: Tensor) -> Tensor:
    """(b, c, h, w) -> (b, h*w, c)."""
    return image.reshape(*image.shape[:2], -1).transpose(1, 2)
