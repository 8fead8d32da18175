"""What a static graph cannot be made of is refused before any work, every part of it in one message."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from model_families import CONDITIONING, CONTROLNET, PIXART, SD15_UNET, SDXL_UNET, build, clip, pixart, unet
from torch import Tensor, nn

from sdconvert.adapters import AdapterRegistry, GraphSize, adapter_for
from sdconvert.errors import (
    UnsupportedAttentionProcessorError,
    UnsupportedLayerError,
    UnsupportedModelError,
    UsageError,
)

SMALL = SD15_UNET | {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1}


class Doubling(AttnProcessor2_0):
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().__call__(*args, **kwargs)


class OtherAttention(nn.Module):
    """Projections to q, k and v, of a class that nobody has registered."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


def test_x3_all_offenders_of_a_model_are_in_one_message() -> None:
    model = build(UNet2DConditionModel, SMALL)
    attentions = [path for path, module in model.named_modules() if isinstance(module, Attention)]
    model.get_submodule(attentions[0]).set_processor(Doubling())
    model.get_submodule(attentions[2]).set_processor(JointAttnProcessor2_0())
    model.conv_out.add_module("odd", OtherAttention())
    model.register_to_config(class_embed_type="timestep")
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError) as error, adapter_for(model).as_graph():
        pass
    message, hint = error.value.args[0], error.value.hint
    assert f"`{attentions[0]}`: its processor Doubling may compute something else" in message
    assert f"`{attentions[2]}`: its processor JointAttnProcessor2_0" in message
    assert "`conv_out.odd`: no layer covers OtherAttention" in message
    assert "class_embed_type='timestep' needs an input" in message
    assert "layer known: Attention, CLIPAttention" in message
    assert "attention processor known: AllegroAttnProcessor2_0, AttnAddedKVProcessor" in message
    assert "`@LayerRegistry.register(OtherAttention)`" in hint
    assert "`@AttentionProcessorRegistry.register(Doubling)`" in hint
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_x3_one_kind_of_offender_has_its_own_error() -> None:
    model = build(UNet2DConditionModel, SMALL)
    model.set_attn_processor(Doubling())
    with pytest.raises(UnsupportedAttentionProcessorError):
        adapter_for(model).check()
    model.set_attn_processor(AttnProcessor2_0())
    model.conv_out.add_module("odd", OtherAttention())
    with pytest.raises(UnsupportedLayerError, match="`conv_out.odd`"):
        adapter_for(model).check()
    with pytest.raises(UnsupportedLayerError, match="`conv_out.odd`"):
        adapter_for(model).attention_layers()


def test_x4_an_attention_with_a_forward_of_its_own_is_of_unknown_class() -> None:
    class Negative(Attention):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return -super().forward(*args, **kwargs)

    model = build(UNet2DConditionModel, SMALL)
    path = next(path for path, module in model.named_modules() if isinstance(module, Attention))
    model.get_submodule(path).__class__ = Negative
    with pytest.raises(UnsupportedLayerError, match=f"`{path}`: no layer covers Negative"):
        adapter_for(model).check()


@pytest.mark.parametrize(
    ("cls", "config", "reason"),
    [
        (UNet2DConditionModel, {"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        (UNet2DConditionModel, {"num_class_embeds": 4}, "num_class_embeds=4"),
        (UNet2DConditionModel, {"time_cond_proj_dim": 8}, "time_cond_proj_dim=8"),
        (UNet2DConditionModel, {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 8}, "encoder_hid_dim_type"),
        (ControlNetModel, {"global_pool_conditions": True}, "global_pool_conditions"),
    ],
)
def test_options_that_the_graph_has_no_input_for_are_refused(cls: Any, config: dict[str, Any], reason: str) -> None:
    base = SMALL if cls is UNet2DConditionModel else CONTROLNET | CONDITIONING
    with pytest.raises(UnsupportedModelError, match=reason):
        adapter_for(build(cls, base | config)).check()


def test_added_conditions_must_be_exactly_those_of_the_model() -> None:
    plain, extended = (
        adapter_for(build(UNet2DConditionModel, SMALL)),
        adapter_for(build(UNet2DConditionModel, SDXL_UNET)),
    )
    call = {"sample": torch.zeros(1), "timestep": torch.tensor(1), "encoder_hidden_states": torch.zeros(1)}
    with pytest.raises(UsageError, match="holds text_embeds; UNet2DConditionModel takes nothing there"):
        plain.pack(call | {"added_cond_kwargs": {"text_embeds": torch.zeros(1)}})
    with pytest.raises(UsageError, match="holds nothing; UNet2DConditionModel takes text_embeds and time_ids"):
        extended.pack(call)
    with pytest.raises(UsageError, match="holds nothing, and this PixArt takes resolution and aspect_ratio"):
        case = pixart(use_additional_conditions=True)
        case.adapter.pack(case.call | {"added_cond_kwargs": None})


def test_arguments_of_none_ask_for_nothing() -> None:
    case = unet(SMALL)
    asked = case.call | {"timestep_cond": None, "cross_attention_kwargs": None, "added_cond_kwargs": None}
    assert case.adapter.pack(asked).keys() == case.adapter.pack(case.call).keys()
    with pytest.raises(UsageError, match="takes no timestep_cond"):
        case.adapter.pack(case.call | {"timestep_cond": torch.zeros(1)})
    with pytest.raises(UsageError, match="takes no attention_mask"):
        clip().adapter.pack({"input_ids": torch.zeros(1, 77), "attention_mask": torch.ones(1, 77)})


def test_sizes_that_a_model_cannot_have_are_refused() -> None:
    with pytest.raises(UsageError, match="78 tokens asked of a text encoder with 77 positions"):
        clip().adapter.io_spec(GraphSize(tokens=78))
    with pytest.raises(UsageError, match="names no sample_size"):
        adapter_for(build(ControlNetModel, CONTROLNET | CONDITIONING)).io_spec()
    with pytest.raises(UsageError, match="9 time ids take all 68 added channels"):
        adapter_for(build(UNet2DConditionModel, SDXL_UNET)).io_spec(GraphSize(time_ids=9))
    assert PIXART["sample_size"] == 16


@pytest.mark.parametrize("origin", list(AdapterRegistry.entries()), ids=lambda origin: origin.__name__)
def test_x6_adapters_and_their_files_are_named_as_the_originals(origin: type) -> None:
    adapter = AdapterRegistry.lookup(origin)
    assert adapter.__name__ == f"{origin.__name__}Adapter"
    assert Path(inspect.getfile(adapter)).stem == Path(inspect.getfile(origin)).stem
