"""UNet2DConditionModel: Stable Diffusion's UNet, and PASD's, which is the same class with a plugin."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from sdconvert.adapters.base import AdapterRegistry, ModelAdapter, Tensors, require_known_arguments
from sdconvert.adapters.time_projection import attach_time_projection_input, project_timestep
from sdconvert.plugins import feeding

_ARGUMENTS = {
    "sample",
    "timestep",
    "encoder_hidden_states",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
}


@AdapterRegistry.register(UNet2DConditionModel)
class UNet2DConditionModelAdapter(ModelAdapter):
    """Graph: sample, t_emb, encoder_hidden_states and, behind a ControlNet, its residuals → out_sample."""

    graph_name = "unet"
    positional = ("sample", "timestep")

    def pack(self, call: Mapping[str, Any]) -> Tensors:
        """See `ModelAdapter.pack`.

        Raises:
            UsageError: The call has other arguments.
        """
        require_known_arguments(call, _ARGUMENTS)
        inputs = {
            "sample": call["sample"],
            "t_emb": project_timestep(self.model, call["timestep"]),
            "encoder_hidden_states": call["encoder_hidden_states"],
        }
        residuals = call.get("down_block_additional_residuals") or ()
        inputs |= {f"down_block_additional_residuals_{k}": tensor for k, tensor in enumerate(residuals)}
        if residuals:
            inputs["mid_block_additional_residual"] = call["mid_block_additional_residual"]
        return inputs

    def unpack(self, outputs: Tensors) -> tuple[Tensor]:
        """See `ModelAdapter.unpack`."""
        return (outputs["out_sample"],)

    def graph_forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """See `ModelAdapter.graph_forward`."""
        sample, t_emb, encoder_hidden_states, *residuals = inputs
        extras: dict[str, Any] = {}
        if residuals:
            extras["down_block_additional_residuals"] = tuple(residuals[:-1])
            extras["mid_block_additional_residual"] = residuals[-1]
        with feeding(self.model, t_emb=t_emb):
            # The timestep has done its work outside; the model only needs a tensor of the right rank here.
            output: tuple[Tensor, ...] = self.model(
                sample, torch.zeros(1), encoder_hidden_states, return_dict=False, **extras
            )
        return output

    def output_names(self, count: int) -> tuple[str, ...]:
        """See `ModelAdapter.output_names`."""
        return ("out_sample",)

    def surgery(self) -> ExitStack:
        """See `ModelAdapter.surgery`."""
        return attach_time_projection_input(self.model)
