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
    PlainAttention,
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
    "AttnAddedKVProcessor": (of_diffusers.AttnAddedKVProcessor, "added key and value projections"),
    "AttnAddedKVProcessor2_0": (of_diffusers.AttnAddedKVProcessor2_0, "added key and value projections"),
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
    "FusedAttnProcessor2_0": (of_diffusers.FusedAttnProcessor2_0, "unfuse_qkv_projections"),
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
    assert {origin.__name__ for origin, rewrite in entries.items() if rewrite is PlainAttention} == {
        "AttnProcessor",
        "AttnProcessor2_0",
        "XFormersAttnProcessor",
        "SlicedAttnProcessor",
        "ExplicitAttnProcessor",
    }
    refused = [rewrite for rewrite in entries.values() if rewrite is not PlainAttention]
    assert all(issubclass(rewrite, RefusedProcessor) and rewrite.reason for rewrite in refused)


def _fused() -> Attention:
    attn = Attention(8, heads=2, dim_head=4)
    attn.fuse_projections()
    return attn


LAYERS: dict[str, Callable[[], Attention]] = {
    "added key and value": lambda: Attention(8, heads=2, dim_head=4, added_kv_proj_dim=8),
    "fused_projections": _fused,
    "fewer heads for keys": lambda: Attention(8, heads=2, kv_heads=1, dim_head=4),
    "qk_norm": lambda: Attention(8, heads=2, dim_head=4, qk_norm="layer_norm"),
    "spatial_norm": lambda: Attention(32, heads=2, dim_head=4, spatial_norm_dim=32),
}


@pytest.mark.parametrize("reason", LAYERS)
def test_x5_layers_that_are_more_than_plain_are_refused_for_graph_and_heads(reason: str) -> None:
    rewrite = rewrite_of(LAYERS[reason]())
    assert reason in str(rewrite.reason_against_graph())
    assert reason in str(rewrite.reason_against_heads())


def test_x5_images_as_input_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="got a 4-D input"):
        per_head(Attention(8, heads=2, dim_head=4))(torch.randn(1, 8, 3, 3))
    assert "4-D input" in str(unsupported_reason(Attention(8, heads=2, dim_head=4, norm_num_groups=2)))


def test_x4_a_subclass_with_its_own_call_is_not_accepted_by_inheritance() -> None:
    attn = Attention(**OPTIONS, processor=Doubling())
    with pytest.raises(UnsupportedAttentionProcessorError, match="Doubling") as error:
        per_head(attn)
    assert "@AttentionProcessorRegistry.register(Doubling)" in error.value.hint
    attn.set_processor(Renamed())
    assert unsupported_reason(attn) is None


def test_x4_an_attention_with_its_own_forward_is_not_rewritten() -> None:
    class Negative(Attention):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return -super().forward(*args, **kwargs)

    assert "Negative has a forward of its own" in str(unsupported_reason(Negative(8, heads=2, dim_head=4)))


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
    assert "known: AttnAddedKVProcessor, " in message
    assert error.value.hint.startswith("register one with `@AttentionProcessorRegistry.register(Doubling)`")
    assert error.value.hint.count("Doubling") == 1
    model["d"].set_processor(of_diffusers.JointAttnProcessor2_0())
    with pytest.raises(UnsupportedModelError, match=r"3 of 4 attentions") as error:
        SHAAttentionPatch.wrap_model("sha", model)
    assert "`d`: its processor JointAttnProcessor2_0" in error.value.args[0]
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_a_mask_of_the_context_is_added_to_the_scores() -> None:
    torch.manual_seed(0)
    attn = Attention(**OPTIONS)
    hidden, context = torch.randn(1, 5, 16), torch.randn(1, 7, 12)
    mask = torch.zeros(1, 1, 7)
    mask[..., 4:] = -10000.0
    with torch.no_grad():
        reference = attn(hidden, context, attention_mask=mask)
        torch.testing.assert_close(attn(hidden, context[:, :4]), reference, rtol=0, atol=1e-6)
        torch.testing.assert_close(per_head(attn)(hidden, context, mask), reference, rtol=0, atol=1e-6)
        attn.set_processor(ExplicitAttnProcessor())
        torch.testing.assert_close(attn(hidden, context, attention_mask=mask), reference, rtol=0, atol=1e-6)
