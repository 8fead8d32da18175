"""Attention per head is the same sum with the same weights, in place in a model and on its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sdconvert.errors import PluginError, UnsupportedModelError
from sdconvert.models.attention import (
    ExplicitAttnProcessor,
    SHAAttention,
    SHAAttentionPatch,
    per_head,
)
from sdconvert.models.pasd import load_pasd
from sdconvert.plugins import PatchPluginContainer, SinglePluginBlock, require_fused

GOLDEN = Path(__file__).parents[1] / "golden"
LIMIT = 1e-5
Golden = Callable[..., Any]
Error = Callable[[Tensor, Tensor], float]

attentions = st.fixed_dictionaries(
    {
        "query_dim": st.integers(1, 24),
        "cross_attention_dim": st.none() | st.integers(1, 24),
        "heads": st.integers(1, 6),
        "dim_head": st.integers(1, 12),
        "bias": st.booleans(),
        "out_bias": st.booleans(),
        "upcast_attention": st.booleans(),
    }
)
tokens = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


def inputs(attn: Attention, sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor | None]:
    batch, queries, keys = sizes
    context = torch.randn(batch, keys, attn.cross_attention_dim) if attn.is_cross_attention else None
    return torch.randn(batch, queries, attn.query_dim), context


def close(x: Tensor, reference: Tensor) -> bool:
    return bool((x - reference).abs().max() <= LIMIT * reference.abs().max())


@settings(deadline=None)
@given(attentions, tokens, st.integers(0, 2**31))
def test_sha_equals_mha(options: dict[str, Any], sizes: tuple[int, int, int], seed: int) -> None:
    torch.manual_seed(seed)
    attn = Attention(**options)
    with torch.no_grad():
        hidden, context = inputs(attn, sizes)
        reference = attn(hidden, encoder_hidden_states=context)
        assert close(per_head(attn)(hidden, encoder_hidden_states=context), reference)
        attn.set_processor(ExplicitAttnProcessor())
        assert close(attn(hidden, encoder_hidden_states=context), reference)


@settings(deadline=None)
@given(attentions)
def test_weights_are_bit_equal_slices(options: dict[str, Any]) -> None:
    attn = Attention(**options)
    sha = per_head(attn)
    state = sha.state_dict()
    assert state.keys() == {
        *(f"to_{x}_convs.{i}.weight" for x in "qkv" for i in range(options["heads"])),
        *(f"to_{x}_convs.{i}.bias" for x in "qkv" for i in range(options["heads"]) if options["bias"]),
        *(name for name in attn.state_dict() if name.startswith("to_out")),
    }
    for x in "qkv":
        convs = [state[f"to_{x}_convs.{i}.weight"] for i in range(options["heads"])]
        assert all(conv.shape[0] == options["dim_head"] and conv.shape[2:] == (1, 1) for conv in convs)
        assert torch.equal(torch.cat(convs)[..., 0, 0], getattr(attn, f"to_{x}").weight)


def test_slices_take_no_memory() -> None:
    attn = Attention(query_dim=16, heads=4, dim_head=4)
    sha = per_head(attn)
    storages = {parameter.untyped_storage().data_ptr() for parameter in sha.to_q_convs.parameters()}
    assert storages == {attn.to_q.weight.untyped_storage().data_ptr()}


class Doubling(AttnProcessor2_0):
    """A subclass with a call of its own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().__call__(*args, **kwargs)


def test_h17_wrap_model_lists_all_refused_layers_and_touches_none() -> None:
    model = nn.ModuleDict({name: Attention(query_dim=8, heads=2, dim_head=4) for name in "abc"})
    model["a"].set_processor(Doubling())
    model["c"].set_processor(Doubling())
    with pytest.raises(UnsupportedModelError, match=r"2 of 3 attentions[^:]*:\n`a`: .*\n`c`: "):
        SHAAttentionPatch.wrap_model("sha", model)
    assert not any(isinstance(module, PatchPluginContainer) for module in model.modules())
    assert SHAAttentionPatch.wrap_model("sha", model, exclude_key="a|c").keys() == {"b"}


def graph_ops(module: nn.Module, *args: Tensor) -> list[str]:
    program = torch.export.export(module, args, strict=False)
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_exported_attention_is_matmul_softmax_matmul() -> None:
    attn = Attention(query_dim=16, heads=4, dim_head=4, processor=ExplicitAttnProcessor()).eval()
    shown = {"aten.matmul.default", "aten.softmax.int"}
    hidden = torch.randn(1, 6, 16)
    kernels = [op for op in graph_ops(attn, hidden) if op in shown]
    assert kernels == ["aten.matmul.default", "aten.softmax.int", "aten.matmul.default"]
    sha_ops = graph_ops(per_head(attn), hidden)
    assert [op for op in sha_ops if op in shown] == kernels * 4
    assert sha_ops.count("aten.conv2d.default") == 12
    assert sha_ops.count("aten.cat.default") == 1


@pytest.mark.parametrize("variant", ["pasd", "pasd_light", "pasd_rrdb"])
def test_h17_sha_patch_over_pasd(variant: str, golden: Golden, relative_error: Error) -> None:
    reference = golden(variant)
    unet, controlnet = load_pasd(GOLDEN / variant)
    for model, run in ((unet, reference.run_unet), (controlnet, reference.run_controlnet)):
        mha, mha_keys = run(model), list(model.state_dict())
        heads = {path: module.heads for path, module in model.named_modules() if isinstance(module, Attention)}
        group = SHAAttentionPatch.wrap_model("sha", model)
        assert list(group) == list(heads)
        assert [name for name in model.state_dict() if ".sha." not in name] == mha_keys
        with pytest.raises(PluginError, match=r"fuse\(\)"):
            require_fused(model)
        live = run(model)
        group.fuse()
        require_fused(model)
        fused = run(model)
        outputs = [(mha, live, fused)] if isinstance(mha, Tensor) else [(mha[k], live[k], fused[k]) for k in mha]
        for expected, *others in outputs:
            assert all(relative_error(other, expected) <= LIMIT for other in others)
        projections = {f"{path}.to_{x}.weight" for path in heads for x in "qkv"}
        convs = {f"{path}.to_{x}_convs.{i}.weight" for path, n in heads.items() for x in "qkv" for i in range(n)}
        assert set(model.state_dict()) == set(mha_keys) - projections | convs
        assert not any(isinstance(module, PatchPluginContainer | Attention) for module in model.modules())


def test_h17_branches_are_compared_inside_the_running_model() -> None:
    model = nn.Sequential(Attention(query_dim=8, heads=2, dim_head=4))
    (patch,) = SHAAttentionPatch.wrap_model("sha", model).plugins
    hidden = torch.randn(1, 5, 8)
    with torch.no_grad():
        sha = model(hidden)
        patch.attention.to_q_convs[0].weight.data = torch.zeros(4, 8, 1, 1)
        assert not torch.equal(model(hidden), sha)
        with patch.disabled():
            assert close(model(hidden), sha)


class Negate(SinglePluginBlock):
    """A visible effect of an output hook."""

    def forward(self, fea_in: tuple[Any, ...], fea_out: Tensor) -> Tensor:
        return -fea_out


@pytest.mark.parametrize("patch_first", [False, True])
def test_h7_plugins_on_the_layer_survive_patching_and_fusing(patch_first: bool) -> None:
    model = nn.Sequential(Attention(query_dim=8, heads=2, dim_head=4))
    hidden = torch.randn(1, 5, 8)
    with torch.no_grad():
        expected = -model(hidden)
        if patch_first:
            group = SHAAttentionPatch.wrap_model("sha", model)
        plugin = Negate("negate", model[0])
        if not patch_first:
            group = SHAAttentionPatch.wrap_model("sha", model)
        assert close(model(hidden), expected)
        group.fuse()
        assert isinstance(model[0], SHAAttention)
        assert close(model(hidden), expected)
        plugin.remove()
        assert close(model(hidden), -expected)
        assert "0.negate" not in dict(model.named_modules())
