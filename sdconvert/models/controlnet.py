"""Plugins around a ControlNet: PASD's additions to it, and a ControlNet inside a plain UNet call.

PASD's ControlNet is a stock diffusers ControlNet plus a plugin for what its conditioning embedding has beyond:

image -> conv_in -> silu -> [preprocesser] -> (conv, silu) x 2(n-1) -> conv_out -> stock ControlNet
                            RRDB x 2            after each stride-2 conv: to_rgbs[i] -> rgbs[i]
"""

import inspect
from typing import Any

from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from sdconvert.errors import PluginError
from sdconvert.models.rrdb import RRDB
from sdconvert.plugins import MultiPluginBlock, match_layers

_RGB_CHANNELS = 3
_RRDB_BLOCKS = 2
_RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")
# What a ControlNet is called with like its UNet, and what only it is called with.
_SHARED = ("timestep", "encoder_hidden_states", "class_labels", "timestep_cond", "attention_mask", "added_cond_kwargs")
_OWN = ("conditioning_scale", "guess_mode")
# Where a ControlNet must be built like its UNet for the residuals to fit.
_COMMON_CONFIG = ("in_channels", "block_out_channels", "layers_per_block", "down_block_types", "cross_attention_dim")


class ConditioningPlugin(MultiPluginBlock):
    """`to_rgbs` and `preprocesser` of PASD's conditioning embedding, and its threefold return value.

    With it, `controlnet(...)` returns `(rgbs, down_block_res_samples, mid_block_res_sample)`. `rgbs` are the n - 1
    pictures (b, 3, H / 2**(i+1), W / 2**(i+1)) that the training compares with the photograph; they have no part in
    the result. A call with `return_rgbs=False` leaves them out of the computation (and of an exported graph) and has
    None in their place. The attribute of that name is the default.

    Args:
        name: Of the plugin on the ControlNet.
        host_model: The ControlNet; the modules go into its `controlnet_cond_embedding`.
        return_rgbs: Have `to_rgbs`.
        use_rrdb: Have `preprocesser`.
    """

    def __init__(
        self, name: str, host_model: ControlNetModel, *, return_rgbs: bool = True, use_rrdb: bool = False
    ) -> None:
        embedding: Any = host_model.controlnet_cond_embedding
        # The activation after a convolution is no module: its output is met as the input of the next convolution.
        followers = [*(f"blocks.{i}" for i in range(2, len(embedding.blocks), 2)), "conv_out"]
        sources = ["pre_hook:", *(f"pre_hook:controlnet_cond_embedding.{name}" for name in followers)]
        targets = ["pre_hook:controlnet_cond_embedding.blocks.0", ""]
        super().__init__(name, match_layers(sources, host_model), match_layers(targets, host_model))
        self.return_rgbs = return_rgbs
        self.rgbs: list[Tensor] | None = None
        width = embedding.conv_in.out_channels
        if use_rrdb:
            blocks = [RRDB(width, width) for _ in range(_RRDB_BLOCKS)]
            self._graft(embedding, "preprocesser", nn.Sequential(*blocks))
        if return_rgbs:
            convs = [nn.Conv2d(conv.out_channels, _RGB_CHANNELS, 3, padding=1) for conv in list(embedding.blocks)[1::2]]
            self._graft(embedding, "to_rgbs", nn.ModuleList(convs))

    def from_layer_hook(
        self, host: nn.Module, fea_in: tuple[Any, ...], fea_out: Any, idx: int, fea_kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take the plugin's own argument out of the call; make each of the `rgbs`."""
        if idx == 0:
            return fea_in, self._arguments(dict(fea_kwargs or {}))
        if self.rgbs is not None:
            self.rgbs.append(self._embedding.to_rgbs[idx - 1](fea_in[0]))
        return None

    def to_layer_hook(self, host: nn.Module, fea_in: tuple[Any, ...], fea_out: Any, idx: int) -> Any:
        """Preprocess the embedding; put the `rgbs` in front of what the ControlNet returns."""
        if idx == 1:
            return (self.rgbs, *fea_out)
        return (self._embedding.preprocesser(fea_in[0]),) if hasattr(self._embedding, "preprocesser") else None

    @property
    def _embedding(self) -> Any:
        return self.host_model.controlnet_cond_embedding

    def _arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        wanted = kwargs.pop("return_rgbs", self.return_rgbs)
        if wanted and not hasattr(self._embedding, "to_rgbs"):
            raise PluginError(
                "this ControlNet was built without to_rgbs and cannot return them",
                hint="call it with return_rgbs=False, or set return_rgbs in its config",
            )
        if kwargs.setdefault("return_dict", False):
            raise PluginError(
                "PASD's ControlNet returns a tuple (rgbs, down, mid), for which diffusers has no output class",
                hint="leave out return_dict=True",
            )
        self.rgbs = [] if wanted else None
        return kwargs


class ControlNetPlugin(MultiPluginBlock):
    """Runs a ControlNet inside a plain UNet call, so that the pair is one module.

        plugin = ControlNetPlugin("controlnet", unet, controlnet)
        with feeding(unet, cond=image, conditioning_scale=0.8):
            unet(sample, timestep, encoder_hidden_states)

    computes what calling the ControlNet and handing its residuals to the UNet does, bit for bit, for every UNet and
    ControlNet of one family. `cond` is the control image. The ControlNet gets the UNet call's own sample, timestep and
    conditions; `timestep`, `encoder_hidden_states` and the like can be fed where it is to get others, and
    `conditioning_scale` and `guess_mode` go to it alone.

    Args:
        name: Of the plugin on the UNet; the ControlNet becomes its child `controlnet`.
        host_model: The UNet.
        controlnet: A stock ControlNet or PASD's.

    Raises:
        PluginError: The ControlNet is built for another UNet.
    """

    host_model: UNet2DConditionModel

    def __init__(self, name: str, host_model: UNet2DConditionModel, controlnet: ControlNetModel) -> None:
        root = match_layers("pre_hook:", host_model)
        super().__init__(name, root, root, first=True)  # plugins that read the residuals, as PASD's does, come later
        _require_common_config(host_model, controlnet)
        self.controlnet = controlnet
        self.residuals: dict[str, Any] = {}
        self.input_data: dict[str, Any] = {}
        self.register_input_feeder_to(host_model)

    def from_layer_hook(
        self, host: nn.Module, fea_in: tuple[Any, ...], fea_out: Any, idx: int, fea_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Run the ControlNet on what the UNet is called with.

        Raises:
            PluginError: No control image was fed, or the call has residuals of its own.
        """
        call = self._call(fea_in, fea_kwargs)
        fed = self.input_data
        if "cond" not in fed:
            raise PluginError(
                f"the UNet's plugin `{self.name}` runs a ControlNet but has no control image",
                hint="call it inside `with feeding(unet, cond=image):`, or inside `with plugin.disabled():`",
            )
        if given := [name for name in _RESIDUALS if call.get(name) is not None]:
            raise PluginError(
                f"the UNet is called with {given[0]}, which its plugin `{self.name}` is to make",
                hint="leave the argument out, or run the call inside `with plugin.disabled():`",
            )
        arguments = {name: call[name] for name in _SHARED if call.get(name) is not None}
        arguments |= {name: fed[name] for name in (*_SHARED, *_OWN) if name in fed}
        # PASD's ControlNet returns pictures before the residuals.
        *_, down, mid = self.controlnet(call["sample"], **arguments, controlnet_cond=fed["cond"], return_dict=False)
        self.residuals = dict(zip(_RESIDUALS, (down, mid), strict=True))

    def to_layer_hook(
        self, host: nn.Module, fea_in: tuple[Any, ...], fea_out: Any, idx: int, fea_kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Put the residuals into the UNet's call."""
        return (), {**self._call(fea_in, fea_kwargs), **self.residuals}

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> dict[str, Any]:
        return inspect.signature(self.host_model.forward).bind_partial(*args, **(kwargs or {})).arguments


def _require_common_config(unet: Any, controlnet: Any) -> None:
    """The UNet adds as many residuals as it is given skips for, and drops the rest without a word."""
    different = [name for name in _COMMON_CONFIG if _listed(unet.config[name]) != _listed(controlnet.config[name])]
    if different:
        first = different[0]
        raise PluginError(
            f"the ControlNet is built for another UNet: its {first} is {controlnet.config[first]}, the UNet's "
            f"{unet.config[first]}",
            hint="take the ControlNet of the UNet's family",
        )


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
