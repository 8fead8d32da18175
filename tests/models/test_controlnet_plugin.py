"""A ControlNet inside a plain UNet call computes what the two compute one after the other, bit for bit."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from sdconvert.errors import PluginError
from sdconvert.models.attention import ExplicitAttnProcessor
from sdconvert.models.controlnet import ControlNetPlugin
from sdconvert.models.pasd import load_pasd
from sdconvert.plugins import feeding, require_fused

GOLDEN = Path(__file__).parents[1] / "golden"
Golden = Callable[..., Any]
COMMON: dict[str, Any] = {"norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": 6}
FAMILIES: dict[str, dict[str, Any]] = {
    "two blocks": {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
    },
    "sd15": {"block_out_channels": (4, 8, 8, 8)},
    "sdxl": {
        "block_out_channels": (4, 8, 8),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 2,
        "projection_class_embeddings_input_dim": 20,
    },
}


def pair(family: str) -> tuple[UNet2DConditionModel, ControlNetModel]:
    """Random weights, the zero convolutions of the ControlNet included."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**COMMON, **FAMILIES[family])
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4))
    for parameter in controlnet.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return unet.eval(), controlnet.eval()


def inputs(family: str) -> tuple[dict[str, Any], Tensor]:
    """Arguments of both models, and the control image."""
    generator = torch.Generator().manual_seed(1)
    call = {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(601),
        "encoder_hidden_states": torch.randn(2, 5, 6, generator=generator),
    }
    if family == "sdxl":
        added = {"text_embeds": torch.randn(2, 8, generator=generator), "time_ids": torch.rand(2, 6)}
        call["added_cond_kwargs"] = added
    return call, torch.rand(2, 3, 16, 16, generator=generator)


def apart(unet: Any, controlnet: Any, call: dict[str, Any], image: Tensor, **own: Any) -> Tensor:
    *_, down, mid = controlnet(**call, controlnet_cond=image, return_dict=False, **own)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    sample: Tensor = unet(**call, **residuals, return_dict=False)[0]
    return sample


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("own", [{}, {"conditioning_scale": 0.7}, {"guess_mode": True}], ids=str)
def test_the_pair_equals_two_calls(family: str, own: dict[str, Any]) -> None:
    unet, controlnet = pair(family)
    call, image = inputs(family)
    expected, alone = apart(unet, controlnet, call, image, **own), unet(**call).sample
    plugin = ControlNetPlugin("controlnet", unet, controlnet)
    with feeding(unet, cond=image, **own):
        assert torch.equal(unet(**call).sample, expected)
        sample, timestep, text = (call[name] for name in ("sample", "timestep", "encoder_hidden_states"))
        rest = {name: value for name, value in call.items() if name == "added_cond_kwargs"}
        assert torch.equal(unet(sample, timestep, text, None, return_dict=False, **rest)[0], expected)
    assert not torch.equal(expected, alone)
    with plugin.disabled():
        assert torch.equal(unet(**call).sample, alone)
    assert plugin.residuals == {}


@torch.no_grad()
@pytest.mark.parametrize("variant", ["pasd", "pasd_light", "pasd_rrdb"])
def test_pasd_as_one_module_equals_two_calls(variant: str, golden: Golden) -> None:
    """PASD's own plugin on the UNet was attached earlier, and sees the residuals all the same."""
    reference = golden(variant)
    unet, controlnet = load_pasd(GOLDEN / variant)
    expected = reference.run_unet(unet, reference.run_controlnet(controlnet))
    ControlNetPlugin("controlnet", unet, controlnet)
    names = ("sample", "timestep", "encoder_hidden_states")
    scale = float(reference.tensors["conditioning_scale"])
    with feeding(unet, cond=reference.tensors["controlnet_cond"], conditioning_scale=scale):
        assert torch.equal(unet(*(reference.tensors[name] for name in names)).sample, expected)


@torch.no_grad()
def test_what_is_fed_goes_before_the_call_s() -> None:
    unet, controlnet = pair("two blocks")
    call, image = inputs("two blocks")
    other = {"timestep": torch.tensor(3), "encoder_hidden_states": torch.randn(2, 5, 6)}
    *_, down, mid = controlnet(**{**call, **other}, controlnet_cond=image, return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    expected = unet(**call, **residuals).sample
    ControlNetPlugin("controlnet", unet, controlnet)
    with feeding(unet, cond=image, **other):
        assert torch.equal(unet(**call).sample, expected)


@torch.no_grad()
def test_copies_are_independent_and_removal_leaves_nothing() -> None:
    unet, controlnet = pair("two blocks")
    call, image = inputs("two blocks")
    keys, alone = list(unet.state_dict()), unet(**call).sample
    plugin = ControlNetPlugin("controlnet", unet, controlnet)
    expected = apart_of_plugged(unet, plugin, call, image)
    clone = copy.deepcopy(unet)
    for parameter in controlnet.parameters():
        parameter.data.zero_()
    with feeding(clone, cond=image):
        assert torch.equal(clone(**call).sample, expected)
    plugin.remove()
    assert list(unet.state_dict()) == keys
    assert torch.equal(unet(**call).sample, alone)
    assert not unet._forward_pre_hooks
    assert not hasattr(unet, "input_feeder")


def apart_of_plugged(unet: Any, plugin: ControlNetPlugin, call: dict[str, Any], image: Tensor) -> Tensor:
    with plugin.disabled():
        return apart(unet, plugin.controlnet, call, image)


class _Pair(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, image: Tensor) -> Tensor:
        with feeding(self.unet, cond=image):
            output: Tensor = self.unet(sample, timestep, text, return_dict=False)[0]
        return output


@torch.no_grad()
def test_the_pair_is_traced_as_one_graph() -> None:
    unet, controlnet = pair("two blocks")
    call, image = inputs("two blocks")
    ControlNetPlugin("controlnet", unet, controlnet)
    require_fused(unet)
    for model in (unet, controlnet):
        model.set_attn_processor(ExplicitAttnProcessor())
    graph = _Pair(unet)
    program = torch.export.export(graph, (*call.values(), image), strict=False)
    torch.testing.assert_close(program.module()(*call.values(), image), graph(*call.values(), image))


def test_a_call_that_the_plugin_cannot_serve_is_an_error() -> None:
    unet, controlnet = pair("two blocks")
    call, image = inputs("two blocks")
    ControlNetPlugin("controlnet", unet, controlnet)
    with pytest.raises(PluginError, match=r"`controlnet` runs a ControlNet but has no control image\n.*cond=image"):
        unet(**call)
    with feeding(unet, image=image), pytest.raises(PluginError, match="no control image"):
        unet(**call)
    with feeding(unet, cond=image), pytest.raises(PluginError, match="down_block_additional_residuals"):
        unet(**call, down_block_additional_residuals=[], mid_block_additional_residual=None)


def test_a_controlnet_of_another_family_is_refused() -> None:
    unet, _ = pair("sd15")
    before = list(unet.state_dict())
    with pytest.raises(PluginError, match=r"built for another UNet: its block_out_channels is \(8, 16\), the UNet's"):
        ControlNetPlugin("controlnet", unet, pair("two blocks")[1])
    assert list(unet.state_dict()) == before
    assert not unet._forward_pre_hooks
