"""UNet2DConditionModel: the UNet of Stable Diffusion 1, 2 and XL, and PASD's, which is the same class with a plugin."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from sdconvert.adapters.added_conditions import (
    added_condition_specs,
    call_with_added_conditions,
    pack_added_conditions,
    unsupported_conditions,
    with_time_ids,
)
from sdconvert.adapters.base import (
    AdapterRegistry,
    ModelAdapter,
    require_known_arguments,
    sample_size,
    sample_spec,
)
from sdconvert.adapters.capabilities import AdapterCapabilities
from sdconvert.adapters.residuals import residual_shapes
from sdconvert.adapters.spec import GraphSize, IOSpec, Tensors, TensorSpec, numbered
from sdconvert.adapters.time_projection import attach_time_projection_input, project_timestep
from sdconvert.models.pixel_attention import LightPixelAttentionPlugin, PixelAttentionPlugin
from sdconvert.plugins import feeding
from sdconvert.registry import Offender

_DOWN, _MID = "down_block_additional_residuals", "mid_block_additional_residual"
_ARGUMENTS = {"sample", "timestep", "encoder_hidden_states", "added_cond_kwargs", _DOWN, _MID}


@AdapterRegistry.register(UNet2DConditionModel)
class UNet2DConditionModelAdapter(ModelAdapter):
    """Graph → out_sample.

    Inputs: sample, t_emb, encoder_hidden_states; for SDXL text_embeds and time_embeds; behind a ControlNet its
    residuals. `t_emb` and `time_embeds` are sinusoids.
    """

    graph_name = "unet"
    positional = ("sample", "timestep", "encoder_hidden_states")
    capabilities: ClassVar = AdapterCapabilities(
        quantize=True, mha2sha=True, adaround=True, cfg_split=True, block_parallel=True
    )

    def pack(self, call: Mapping[str, Any]) -> Tensors:
        """See `ModelAdapter.pack`.

        Raises:
            UsageError: The call has other arguments, or other added conditions than the model takes.
        """
        require_known_arguments(call, _ARGUMENTS)
        inputs = {
            "sample": call["sample"],
            "t_emb": project_timestep(self.model, torch.as_tensor(call["timestep"])),
            "encoder_hidden_states": call["encoder_hidden_states"],
            **pack_added_conditions(self.model, call.get("added_cond_kwargs")),
        }
        residuals = call.get(_DOWN) or ()
        inputs |= {f"{_DOWN}_{k}": tensor for k, tensor in enumerate(residuals)}
        if residuals:
            inputs[_MID] = call[_MID]
        return inputs

    def unpack(self, outputs: Tensors) -> tuple[Tensor]:
        """See `ModelAdapter.unpack`."""
        return (outputs["out_sample"],)

    def graph_forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """See `ModelAdapter.graph_forward`."""
        sample, t_emb, encoder_hidden_states, *rest = inputs
        extras = call_with_added_conditions(self.model, rest)
        if rest:
            extras |= {_DOWN: tuple(rest[:-1]), _MID: rest[-1]}
        with feeding(self.model, t_emb=t_emb):
            # The timestep has done its work outside; the model only needs a tensor of the right rank here.
            output: tuple[Tensor, ...] = self.model(
                sample, torch.zeros(1), encoder_hidden_states, return_dict=False, **extras
            )
        return output

    def output_names(self, count: int) -> tuple[str, ...]:
        """See `ModelAdapter.output_names`."""
        return ("out_sample",)

    def io_spec(self, size: GraphSize | None = None) -> IOSpec:
        """See `ModelAdapter.io_spec`; PASD's UNet always has the residuals of its ControlNet."""
        size = size or GraphSize()
        model: Any = self.model
        config = model.config
        area = sample_size(config, size)
        inputs = [
            sample_spec("sample", config.in_channels, area),
            TensorSpec("t_emb", (1, model.time_proj.num_channels), range=(-1.0, 1.0)),
            TensorSpec("encoder_hidden_states", (1, size.tokens, text_channels(config))),
            *added_condition_specs(model, size),
        ]
        if size.controlnet or self._is_pasd():
            *down, mid = residual_shapes(config, area)
            inputs += [TensorSpec(f"{_DOWN}_{k}", shape) for k, shape in enumerate(down)]
            inputs.append(TensorSpec(_MID, mid))
        return IOSpec(tuple(inputs), (sample_spec("out_sample", config.out_channels, area),))

    def size_of(self, inputs: Tensors) -> GraphSize:
        """See `ModelAdapter.size_of`."""
        size = replace(super().size_of(inputs), controlnet=_MID in inputs)
        return with_time_ids(self.model, size, inputs)

    def block_paths(self) -> list[str]:
        """See `ModelAdapter.block_paths`."""
        ends = ("time_embedding", "add_embedding", "conv_in"), ("conv_norm_out", "conv_out")
        first, last = ([path for path in paths if getattr(self.model, path, None) is not None] for paths in ends)
        down, up = numbered("down_blocks", self.model), numbered("up_blocks", self.model)
        return [*first, *down, "mid_block", *up, *last]

    def surgery(self) -> ExitStack:
        """See `ModelAdapter.surgery`."""
        return attach_time_projection_input(self.model)

    def offenders(self) -> Iterable[Offender]:
        """See `ModelAdapter.offenders`."""
        return unsupported_conditions(self.model)

    def _is_pasd(self) -> bool:
        plugins = PixelAttentionPlugin | LightPixelAttentionPlugin
        return any(isinstance(module, plugins) for module in self.model.modules())


def text_channels(config: Any) -> int:
    """Channels of the text that a UNet or ControlNet attends to; a config may list one width per block."""
    width = config.cross_attention_dim
    return int(width[0] if isinstance(width, list | tuple) else width)
