"""UNet and ControlNet as they run on the phone: the one's residuals are the other's inputs."""

from typing import Any

import torch
from torch import Tensor

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.adapters.added_conditions import call_with_added_conditions
from sdconvert.models.controlnet import ControlNetPlugin
from sdconvert.plugins import feeding


@torch.no_grad()
def run_pair(unet: ModelAdapter, controlnet: ModelAdapter, conditioning_scale: float, inputs: Tensors) -> Tensor:
    """Run both fp32 models as one, in whatever form of attention they have, on inputs of the ControlNet's graph.

    Args:
        unet: Covers the UNet; it is left as it was.
        controlnet: Covers its ControlNet, likewise.
        conditioning_scale: Weight of the residuals.
        inputs: sample, t_emb, encoder_hidden_states, controlnet_cond, and added conditions.

    Returns:
        The UNet's out_sample.
    """
    sample, t_emb, encoder_hidden_states, controlnet_cond, *rest = inputs.values()
    extras = call_with_added_conditions(unet.model, rest)
    models: tuple[Any, Any] = (unet.model, controlnet.model)
    with unet.as_graph(), controlnet.as_graph():
        plugin = ControlNetPlugin("controlnet", *models)
        own = {"cond": controlnet_cond, "conditioning_scale": conditioning_scale}
        try:
            with feeding(controlnet.model, t_emb=t_emb), feeding(unet.model, t_emb=t_emb, **own):
                (out_sample,) = unet.model(sample, torch.zeros(1), encoder_hidden_states, return_dict=False, **extras)
        finally:
            plugin.remove()
    output: Tensor = out_sample
    return output
