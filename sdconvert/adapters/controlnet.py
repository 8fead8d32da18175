"""ControlNetModel: the stock one, and PASD's, whose `to_rgbs` heads stay outside the graph (they feed nothing)."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from torch import Tensor, nn

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
from sdconvert.adapters.unet_2d_condition import text_channels
from sdconvert.errors import UsageError
from sdconvert.models.controlnet import ConditioningPlugin
from sdconvert.plugins import feeding
from sdconvert.registry import Offender

_ARGUMENTS = {
    "sample",
    "timestep",
    "encoder_hidden_states",
    "controlnet_cond",
    "conditioning_scale",
    "added_cond_kwargs",
}
_DOWN, _MID = "down_block_res_sample", "mid_block_res_sample"


@AdapterRegistry.register(ControlNetModel)
class ControlNetModelAdapter(ModelAdapter):
    """Graph → the down residuals and the mid residual.

    Inputs: sample, t_emb, encoder_hidden_states, controlnet_cond; for SDXL text_embeds and time_embeds besides.

    Args:
        model: The ControlNet.
        conditioning_scale: Weight of the residuals, a constant of the graph.
    """

    graph_name = "controlnet"
    positional = ("sample", "timestep", "encoder_hidden_states", "controlnet_cond")
    capabilities: ClassVar = AdapterCapabilities(
        quantize=True, mha2sha=True, adaround=True, cfg_split=True, block_parallel=True
    )

    def __init__(self, model: nn.Module, conditioning_scale: float = 1.0) -> None:
        super().__init__(model)
        self.conditioning_scale = conditioning_scale

    def pack(self, call: Mapping[str, Any]) -> Tensors:
        """See `ModelAdapter.pack`.

        Raises:
            UsageError: The call has other arguments, other added conditions than the model takes, or asks for another
                `conditioning_scale` than the graph's.
        """
        # Guess mode off is what the graph does; on, it is an argument that the graph has no place for.
        require_known_arguments({k: v for k, v in call.items() if (k, v) != ("guess_mode", False)}, _ARGUMENTS)
        if (asked := call.get("conditioning_scale", self.conditioning_scale)) != self.conditioning_scale:
            raise UsageError(
                f"conditioning_scale {asked} asked of a ControlNet graph made for {self.conditioning_scale}",
                hint="set pipeline.conditioning_scale in the recipe and convert again",
            )
        return {
            "sample": call["sample"],
            "t_emb": project_timestep(self.model, torch.as_tensor(call["timestep"])),
            "encoder_hidden_states": call["encoder_hidden_states"],
            "controlnet_cond": call["controlnet_cond"],
            **pack_added_conditions(self.model, call.get("added_cond_kwargs")),
        }

    def unpack(self, outputs: Tensors) -> tuple[Any, ...]:
        """See `ModelAdapter.unpack`: (down, mid), and PASD's has None in the place of its pictures before them."""
        down = [outputs[f"{_DOWN}_{k}"] for k in range(len(outputs) - 1)]
        answer = (down, outputs[_MID])
        return (None, *answer) if self._is_pasd() else answer

    def graph_forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """See `ModelAdapter.graph_forward`."""
        sample, t_emb, encoder_hidden_states, controlnet_cond, *rest = inputs
        extras = call_with_added_conditions(self.model, rest)
        with feeding(self.model, t_emb=t_emb):
            *_, down, mid = self.model(
                sample,
                torch.zeros(1),
                encoder_hidden_states,
                controlnet_cond,
                conditioning_scale=self.conditioning_scale,
                return_dict=False,
                **extras,
            )
        return (*down, mid)

    def output_names(self, count: int) -> tuple[str, ...]:
        """See `ModelAdapter.output_names`."""
        return (*(f"{_DOWN}_{k}" for k in range(count - 1)), _MID)

    def io_spec(self, size: GraphSize | None = None) -> IOSpec:
        """See `ModelAdapter.io_spec`; the condition is a picture in [0, 1], larger than the sample.

        Raises:
            UsageError: `size` asks for what only a UNet has, or gives no size: a ControlNet's config names none.
        """
        size = size or GraphSize()
        if size.controlnet:
            raise UsageError("a ControlNet takes no residuals of a ControlNet", hint="leave GraphSize.controlnet out")
        model: Any = self.model
        config = model.config
        area = sample_size(config, size)
        factor = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
        picture = (area[0] * factor, area[1] * factor)
        inputs = (
            sample_spec("sample", config.in_channels, area),
            TensorSpec("t_emb", (1, model.time_proj.num_channels), range=(-1.0, 1.0)),
            TensorSpec("encoder_hidden_states", (1, size.tokens, text_channels(config))),
            TensorSpec("controlnet_cond", (1, config.conditioning_channels, *picture), range=(0.0, 1.0)),
            *added_condition_specs(model, size),
        )
        shapes = residual_shapes(config, area)
        names = self.output_names(len(shapes))
        return IOSpec(inputs, tuple(TensorSpec(name, shape) for name, shape in zip(names, shapes, strict=True)))

    def size_of(self, inputs: Tensors) -> GraphSize:
        """See `ModelAdapter.size_of`."""
        return with_time_ids(self.model, super().size_of(inputs), inputs)

    def block_paths(self) -> list[str]:
        """See `ModelAdapter.block_paths`."""
        first = ["time_embedding", "add_embedding", "conv_in", "controlnet_cond_embedding"]
        return [
            *(path for path in first if getattr(self.model, path, None) is not None),
            *numbered("down_blocks", self.model),
            "mid_block",
            *numbered("controlnet_down_blocks", self.model),
            "controlnet_mid_block",
        ]

    def surgery(self) -> ExitStack:
        """See `ModelAdapter.surgery`."""
        return attach_time_projection_input(self.model)

    def offenders(self) -> Iterator[Offender]:
        """See `ModelAdapter.offenders`."""
        model: Any = self.model
        yield from unsupported_conditions(model)
        if model.config.global_pool_conditions:
            yield Offender("", type(model), "global_pool_conditions: residuals averaged over the picture are missing")

    def _is_pasd(self) -> bool:
        return any(isinstance(module, ConditioningPlugin) for module in self.model.modules())
