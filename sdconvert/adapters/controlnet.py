"""ControlNetModel: the stock one, and PASD's, whose `to_rgbs` heads stay outside the graph (they feed nothing)."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from torch import Tensor, nn

from sdconvert.adapters.base import AdapterRegistry, ModelAdapter, Tensors, require_known_arguments
from sdconvert.adapters.time_projection import attach_time_projection_input, project_timestep
from sdconvert.errors import UsageError
from sdconvert.plugins import feeding

_ARGUMENTS = {"sample", "timestep", "encoder_hidden_states", "controlnet_cond", "conditioning_scale"}


@AdapterRegistry.register(ControlNetModel)
class ControlNetModelAdapter(ModelAdapter):
    """Graph: sample, t_emb, encoder_hidden_states, controlnet_cond → the down residuals and the mid residual.

    Args:
        model: The ControlNet.
        conditioning_scale: Weight of the residuals, a constant of the graph.
    """

    graph_name = "controlnet"
    positional = ("sample", "timestep")

    def __init__(self, model: nn.Module, conditioning_scale: float = 1.0) -> None:
        super().__init__(model)
        self.conditioning_scale = conditioning_scale

    def pack(self, call: Mapping[str, Any]) -> Tensors:
        """See `ModelAdapter.pack`.

        Raises:
            UsageError: The call has other arguments, or asks for another `conditioning_scale` than the graph's.
        """
        require_known_arguments(call, _ARGUMENTS)
        if (asked := call.get("conditioning_scale", self.conditioning_scale)) != self.conditioning_scale:
            raise UsageError(
                f"conditioning_scale {asked} asked of a ControlNet graph made for {self.conditioning_scale}",
                hint="set pipeline.conditioning_scale in the recipe and convert again",
            )
        return {
            "sample": call["sample"],
            "t_emb": project_timestep(self.model, call["timestep"]),
            "encoder_hidden_states": call["encoder_hidden_states"],
            "controlnet_cond": call["controlnet_cond"],
        }

    def unpack(self, outputs: Tensors) -> tuple[None, list[Tensor], Tensor]:
        """See `ModelAdapter.unpack`."""
        down = [outputs[f"down_block_res_sample_{k}"] for k in range(len(outputs) - 1)]
        return None, down, outputs["mid_block_res_sample"]

    def graph_forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """See `ModelAdapter.graph_forward`."""
        sample, t_emb, encoder_hidden_states, controlnet_cond = inputs
        with feeding(self.model, t_emb=t_emb):
            *_, down, mid = self.model(
                sample,
                torch.zeros(1),
                encoder_hidden_states,
                controlnet_cond,
                conditioning_scale=self.conditioning_scale,
                return_dict=False,
            )
        return (*down, mid)

    def output_names(self, count: int) -> tuple[str, ...]:
        """See `ModelAdapter.output_names`."""
        return (*(f"down_block_res_sample_{k}" for k in range(count - 1)), "mid_block_res_sample")

    def surgery(self) -> ExitStack:
        """See `ModelAdapter.surgery`."""
        return attach_time_projection_input(self.model)
