"""Which attention processors are plain attention, and that every other one is refused by name, all at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor as of_diffusers
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from sdconvert.errors import UnsupportedAttentionProcessorError, UnsupportedModelError
from sdconvert.models.attention import SHAAttentionPatch, per_head, unsupported_reason
from sdconvert.models.attention_processors import (
    AttentionProcessorRegistry,
    ExplicitAttnProcessor,
    RefusedProcessor,
    rewrite_of,
)

OPTIONS: dict[str, Any] = {"query_dim": 16, "cross_attention_dim": 12, "heads": 4, "dim_head": 4}
PLAIN: list[Callable[[], Any]] = [
    of_diffusers.AttnProcessor,
    of_diffusers.AttnProcessor2_0,
    of_diffusers.XFormersAttnProcessor,
    lambda: of_diffusers.SlicedAttnProcessor(2),
    ExplicitAttnProcessor,
]
WIDTHS = {"hidden_size": 16, "cross_attention_dim": 12}
OWN_PROJECTIONS = "write them into the layer's to_k and to_v"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "JointAttnProcessor2_0": (of_diffusers.JointAttnProcessor2_0, "SD3Transformer2DModel are missing"),
    "IPAdapterAttnProcessor": (lambda: of_diffusers.IPAdapterAttnProcessor(**WIDTHS), "unload_ip_adapter"),
    "IPAdapterAttnProcessor2_0": (lambda: of_diffusers.IPAdapterAttnProcessor2_0(**WIDTHS), "unload_ip_adapter"),
    "PAGIdentitySelfAttnProcessor2_0": (of_diffusers.PAGIdentitySelfAttnProcessor2_0, "without PAG"),
    "PAGCFGIdentitySelfAttnProcessor2_0": (of_diffusers.PAGCFGIdentitySelfAttnProcessor2_0, "without PAG"),
    "CustomDiffusionAttnProcessor": (
        lambda: of_diffusers.CustomDiffusionAttnProcessor(**WIDTHS),
        OWN_PROJECTIONS,
    ),
    "CustomDiffusionAttnProcessor2_0": (
        lambda: of_diffusers.CustomDiffusionAttnProcessor2_0(**WIDTHS),
        OWN_PROJECTIONS,
    ),
    "LuminaAttnProcessor2_0": (of_diffusers.LuminaAttnProcessor2_0, "rotary embedding"),
}


class Doubling(AttnProcessor2_0):
    """Inherits from a known one and computes something else."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().__call__(*args, **kwargs)


class Renamed(AttnProcessor2_0):
    """Inherits what it computes."""


@pytest.mark.parametrize("make", PLAIN)
def test_x5_plain_processors_are_accepted_with_equal_outputs(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    attn = Attention(**OPTIONS)
    hidden, context = torch.randn(2, 5, 16), torch.randn(2, 7, 12)
    with torch.no_grad():
        reference = attn(hidden, context)
        attn.set_processor(make())
        torch.testing.assert_close(per_head(attn)(hidden, context), reference, rtol=0, atol=1e-6)
        if not isinstance(attn.processor, of_diffusers.XFormersAttnProcessor):  # it runs on GPUs only
            torch.testing.assert_close(attn(hidden, context), reference, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_x5_other_processors_are_refused_by_name_and_reason(name: str) -> None:
    make, reason = REFUSED[name]
    attn = Attention(**OPTIONS, processor=make())
    message = str(unsupported_reason(attn))
    assert f"its processor {name} " in message
    assert reason in message
    with pytest.raises(UnsupportedModelError, match=name):
        per_head(attn)
    with pytest.raises(UnsupportedAttentionProcessorError, match=name):
        rewrite_of(attn).explicit_processor()


def test_x5_every_refused_processor_of_the_registry_has_a_reason() -> None:
    entries = AttentionProcessorRegistry.entries()
    reasons = {origin.__name__: one.reason for origin, one in entries.items() if issubclass(one, RefusedProcessor)}
    assert reasons.keys() >= REFUSED.keys()
    assert all(reasons.values())
    assert {origin.__name__ for origin in entries} - reasons.keys() == {
        *("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor"),
        *("FusedAttnProcessor2_0", "StableAudioAttnProcessor2_0"),
        *("AttnAddedKVProcessor", "AttnAddedKVProcessor2_0"),
        *("SlicedAttnAddedKVProcessor", "XFormersAttnAddedKVProcessor"),
        *("ExplicitAttnProcessor", "ExplicitFusedAttnProcessor", "ExplicitAttnAddedKVProcessor"),
    }


def test_x4_a_subclass_with_its_own_call_is_not_accepted_by_inheritance() -> None:
    attn = Attention(**OPTIONS, processor=Doubling())
    with pytest.raises(UnsupportedAttentionProcessorError, match="Doubling") as error:
        per_head(attn)
    assert "@AttentionProcessorRegistry.register(Doubling)" in error.value.hint
    attn.set_processor(Renamed())
    assert unsupported_reason(attn) is None


def test_x3_all_processors_of_a_model_are_in_one_message_and_no_weight_is_touched() -> None:
    model = nn.ModuleDict({name: Attention(8, heads=2, dim_head=4) for name in "abcd"})
    model["a"].set_processor(Doubling())
    model["c"].set_processor(Doubling())
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedAttentionProcessorError, match=r"2 of 4 attentions") as error:
        SHAAttentionPatch.wrap_model("sha", model)
    message = error.value.args[0]
    assert "`a`: its processor Doubling" in message
    assert "`c`: its processor Doubling" in message
    assert "known: AllegroAttnProcessor2_0, AttnAddedKVProcessor, " in message
    assert error.value.hint.startswith("register one with `@AttentionProcessorRegistry.register(Doubling)`")
    assert error.value.hint.count("Doubling") == 1
    model["d"].set_processor(of_diffusers.JointAttnProcessor2_0())
    with pytest.raises(UnsupportedModelError, match=r"3 of 4 attentions") as error:
        SHAAttentionPatch.wrap_model("sha", model)
    assert "`d`: its processor JointAttnProcessor2_0" in error.value.args[0]
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
