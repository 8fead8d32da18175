"""Every layer that attends is rewritten or named with the reason, and a model is changed as a whole or not at all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import CASES
from diffusers.models import attention_processor as of_diffusers
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from sdconvert.errors import PluginError, UnsupportedModelError
from sdconvert.models.attention import SHAAttention, SHAAttentionPatch, per_head, plan_attention, unsupported_reason
from sdconvert.plugins import PatchPluginContainer

SMALL: dict[str, Any] = {"query_dim": 8, "heads": 2, "dim_head": 4}


class Unknown(nn.Module):
    """Projections to q, k and v, of a class that nobody has registered; there is a known layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(4, 4) for _ in range(3))
        self.inner = Attention(**SMALL)


def mixed() -> nn.ModuleDict:
    """A model with layers of every kind: plain, refused by option, by processor and by class."""
    return nn.ModuleDict(
        {
            "plain": Attention(**SMALL),
            "across": Attention(**SMALL, kv_heads=2, qk_norm="rms_norm_across_heads"),
            "joint": Attention(**SMALL, processor=of_diffusers.JointAttnProcessor2_0()),
            "unknown": Unknown(),
            "torch": nn.MultiheadAttention(8, 2),
            "vae": CASES["VAE"].layer(),
        }
    )


def test_a_plan_names_every_layer_that_attends_once() -> None:
    plan = plan_attention(mixed())
    assert [match.path for match in plan.rewrites] == ["plain", "vae"]
    reasons = {offender.path: offender.reason for offender in plan.offenders}
    assert list(reasons) == ["across", "joint", "unknown", "torch"]
    assert "normalizes across heads" in reasons["across"]
    assert "JointAttnProcessor2_0 attends over image and text jointly" in reasons["joint"]
    assert "nothing is known about what its class Unknown computes" in reasons["unknown"]
    assert "MultiheadAttention" in reasons["torch"]
    assert plan_attention(mixed(), exclude_key="^joint|unknown").offenders == [
        offender for offender in plan.offenders if offender.path in ("across", "torch")
    ]


def test_unsupported_layers_are_refused_together_unless_they_may_be_skipped() -> None:
    model = mixed()
    with pytest.raises(UnsupportedModelError, match=r"(?s)4 of 6 attentions.*`across`.*`joint`.*`unknown`.*`torch`"):
        SHAAttentionPatch.wrap_model("sha", model)
    assert not any(isinstance(module, PatchPluginContainer) for module in model.modules())
    before = model["joint"]
    group = SHAAttentionPatch.wrap_model("sha", model, skip_unsupported=True)
    assert list(group) == ["plain", "vae"]
    group.fuse()
    assert model["joint"] is before
    assert isinstance(model["plain"], SHAAttention)
    assert isinstance(model["unknown"].inner, Attention)


def test_skipping_must_leave_something_to_rewrite() -> None:
    model = nn.ModuleDict({"joint": mixed()["joint"], "torch": nn.MultiheadAttention(8, 2)})
    with pytest.raises(UnsupportedModelError, match="2 of 2 attentions"):
        SHAAttentionPatch.wrap_model("sha", model, skip_unsupported=True)
    with pytest.raises(PluginError, match="finds no layer"):
        SHAAttentionPatch.wrap_model("sha", nn.ModuleDict({"linear": nn.Linear(2, 2)}), skip_unsupported=True)


def test_skipping_and_excluding_go_together() -> None:
    model = mixed()
    group = SHAAttentionPatch.wrap_model("sha", model, exclude_key="^vae$|torch", skip_unsupported=True)
    assert list(group) == ["plain"]


def test_normalized_queries_take_no_scale_and_are_named_before_a_layer_is_touched() -> None:
    model = nn.ModuleDict({"plain": CASES["self"].layer(), "normalized": CASES["qk_norm l2"].layer()})
    with pytest.raises(UnsupportedModelError, match=r"1 of 2 .*\n`normalized`: its scale cannot go into the weights"):
        SHAAttentionPatch.wrap_model("sha", model, fold_scale=True)
    assert not any(isinstance(module, PatchPluginContainer) for module in model.modules())
    assert list(SHAAttentionPatch.wrap_model("sha", model, fold_scale=True, skip_unsupported=True)) == ["plain"]


def _changed(**attributes: Any) -> Attention:
    attn = Attention(**SMALL)
    for name, value in attributes.items():
        setattr(attn, name, value)
    return attn


def _hooked() -> Attention:
    attn = Attention(**SMALL)
    attn.to_v.register_forward_hook(lambda module, args, output: 2 * output)
    return attn


def _uneven() -> Attention:
    attn = Attention(**SMALL, processor=of_diffusers.StableAudioAttnProcessor2_0())
    attn.to_v = nn.Linear(8, 4)
    return attn


def _unfused() -> Attention:
    return Attention(**SMALL, processor=of_diffusers.FusedAttnProcessor2_0())


class Negative(Attention):
    """A forward of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return -super().forward(*args, **kwargs)


ADDED: dict[str, Any] = SMALL | {"added_kv_proj_dim": 8}
OLD, NEW = of_diffusers.AttnProcessor, of_diffusers.AttnProcessor2_0
REFUSED: dict[str, Callable[[], Attention]] = {
    "a norm of queries (qk_norm), which its processor AttnProcessor has no place for": lambda: Attention(
        **SMALL, qk_norm="layer_norm", processor=OLD()
    ),
    "a spatial_norm, which its processor SlicedAttnProcessor has": lambda: Attention(
        32, spatial_norm_dim=4, processor=of_diffusers.SlicedAttnProcessor(1)
    ),
    "a group_norm, which its processor StableAudioAttnProcessor2_0 has": lambda: Attention(
        **SMALL, norm_num_groups=2, processor=of_diffusers.StableAudioAttnProcessor2_0()
    ),
    "added key and value projections, which its processor AttnProcessor2_0 has": lambda: Attention(**ADDED),
    "no group_norm, which its processor AttnAddedKVProcessor needs": lambda: Attention(
        **ADDED, processor=of_diffusers.AttnAddedKVProcessor()
    ),
    "no to_qkv, which its processor FusedAttnProcessor2_0 needs": _unfused,
    "fewer heads for keys and values than for queries, which AttnProcessor2_0 cannot": lambda: Attention(
        **SMALL, kv_heads=1, processor=NEW()
    ),
    "projections to keys and values have different numbers of rows: [4, 8]": _uneven,
    "projections of 12 and [8] rows are no multiples of 2 heads of 4 rows": lambda: _changed(to_q=nn.Linear(8, 12)),
    "it normalizes across heads (qk_norm): norm_q": lambda: Attention(
        **SMALL, kv_heads=2, qk_norm="layer_norm_across_heads"
    ),
    "its to_q is a Sequential": lambda: _changed(to_q=nn.Sequential(nn.Linear(8, 8))),
    "its to_v carries a hook": _hooked,
    "its class Negative has a forward of its own": lambda: Negative(**SMALL),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_name_the_reason(reason: str) -> None:
    attn = REFUSED[reason]()
    assert reason in str(unsupported_reason(attn))
    with pytest.raises(UnsupportedModelError) as error:
        per_head(attn)
    assert reason in str(error.value)


def test_a_layer_that_was_fused_and_is_no_longer_is_what_its_processor_says() -> None:
    attn = Attention(**SMALL)
    attn.fuse_projections()
    attn.to_qkv.weight.data.zero_()
    with torch.no_grad():
        hidden = torch.randn(1, 5, 8)
        reference = attn(hidden)
        assert reference.abs().max() > 0
        torch.testing.assert_close(per_head(attn)(hidden), reference)
