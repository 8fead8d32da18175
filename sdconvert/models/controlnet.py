"""PASD's ControlNet: a stock diffusers ControlNet plus a plugin for what its conditioning embedding has beyond.

image -> conv_in -> silu -> [preprocesser] -> (conv, silu) x 2(n-1) -> conv_out -> stock ControlNet
                            RRDB x 2            after each stride-2 conv: to_rgbs[i] -> rgbs[i]
"""

from typing import Any

from diffusers.models.controlnets.controlnet import ControlNetModel
from torch import Tensor, nn

from sdconvert.errors import PluginError
from sdconvert.models.rrdb import RRDB
from sdconvert.plugins import MultiPluginBlock, match_layers

_RGB_CHANNELS = 3
_RRDB_BLOCKS = 2


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
