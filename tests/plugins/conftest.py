"""A tiny UNet of SD1.5's block types, and what must be the same before and after surgery."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn


@pytest.fixture
def tiny_unet() -> UNet2DConditionModel:
    """Two of SD1.5's block types, several heads, random weights."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


@pytest.fixture
def unet_inputs() -> dict[str, Any]:
    """Inputs of `tiny_unet`."""
    torch.manual_seed(1)
    return {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": 3,
        "encoder_hidden_states": torch.randn(1, 5, 6),
    }


@pytest.fixture
def structure() -> Any:
    """Everything about a model that a removed plugin must leave as it was."""

    def describe(model: nn.Module) -> Any:
        return (
            list(model.state_dict()),
            [(name, id(module)) for name, module in model.named_modules()],
            [(name, id(parameter)) for name, parameter in model.named_parameters()],
            [
                (dict(module._forward_hooks), dict(module._forward_pre_hooks), dict(module._forward_hooks_with_kwargs))
                for module in model.modules()
            ],
            [list(getattr(module, "input_feeder", [])) for module in model.modules()],
            [module.training for module in model.modules()],
        )

    return describe
