"""Each rewrite of a transformer over images: alone, in place, in every option that is taken, refused by name else."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from diffusers.models.activations import ApproximateGELU
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sdconvert.errors import UnsupportedModelError
from sdconvert.models.attention import SHAAttentionPatch
from sdconvert.models.convolutions import LinearToConv2dPatch, PointwiseConv2d
from sdconvert.models.feed_forward import GatedConv2dPatch
from sdconvert.models.layer_norm import ChannelLayerNorm, ChannelLayerNormPatch
from sdconvert.models.rewrites import apply_rewrites
from sdconvert.models.transformer_2d import ImageTransformer2DModel, ImageTransformer2DPatch
from sdconvert.plugins import PatchPluginContainer
from sdconvert.plugins.replacement import ReplacementPatch

ACTIVATIONS = ["geglu", "swiglu", "gelu", "gelu-approximate", "geglu-approximate", "linear-silu"]
LEAVES: list[type[ReplacementPatch]] = [LinearToConv2dPatch, GatedConv2dPatch, ChannelLayerNormPatch]


def make(**options: Any) -> nn.Sequential:
    """A transformer inside of a model, with norms that are no identity."""
    torch.manual_seed(0)
    transformer = Transformer2DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 8, "norm_num_groups": 2} | options
    )
    for parameter in transformer.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return nn.Sequential(transformer.eval())


def inputs(dtype: torch.dtype = torch.float32, size: tuple[int, int] = (3, 5)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 8, *size, generator=generator, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, 6, 12, generator=generator, dtype=dtype),
    }


@torch.no_grad()
def run(model: nn.Sequential, **arguments: Tensor) -> Tensor:
    output: Tensor = model[0](**arguments, return_dict=False)[0]
    return output


def close(x: Tensor, reference: Tensor, limit: float = 1e-5) -> bool:
    return bool((x - reference).abs().max() <= limit * reference.abs().max())


options = st.fixed_dictionaries(
    {
        "use_linear_projection": st.booleans(),
        "attention_bias": st.booleans(),
        "num_layers": st.integers(1, 2),
        "activation_fn": st.sampled_from(ACTIVATIONS),
        "norm_elementwise_affine": st.booleans(),
        "cross_attention_dim": st.sampled_from([None, 12]),
        "only_cross_attention": st.booleans(),
        "double_self_attention": st.booleans(),
    }
)


@settings(deadline=None, max_examples=40)
@given(options, st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_every_option_of_the_transformer_stays(chosen: dict[str, Any], size: tuple[int, int]) -> None:
    if chosen["cross_attention_dim"] is None or chosen["double_self_attention"]:
        chosen["only_cross_attention"] = False
    model, call = make(**chosen).double(), inputs(torch.float64, size)
    if chosen["cross_attention_dim"] is None or chosen["double_self_attention"]:
        del call["encoder_hidden_states"]
    reference = run(model, **call)
    SHAAttentionPatch.wrap_model("sha", model).fuse()
    apply_rewrites(model)
    assert type(model[0]) is ImageTransformer2DModel
    assert not any(type(layer) in (nn.Linear, nn.LayerNorm) for layer in model.modules())
    assert close(run(model, **call), reference, 1e-10)


@pytest.mark.parametrize("patch", LEAVES, ids=lambda patch: patch.__name__)
def test_each_rewrite_of_layers_stands_alone(patch: type[ReplacementPatch]) -> None:
    model, call = make(use_linear_projection=True, cross_attention_dim=12), inputs()
    reference = run(model, **call)
    group = patch.wrap_model("rewrite", model)
    live = run(model, **call)
    with ExitStack() as stack:
        for one in group.values():
            stack.enter_context(one.disabled())
        assert torch.equal(run(model, **call), reference)
    group.fuse()
    assert not any(isinstance(layer, PatchPluginContainer) for layer in model.modules())
    assert close(live, reference)
    assert close(run(model, **call), reference)


def prepared(**chosen: Any) -> nn.Sequential:
    """A transformer whose layers take images."""
    model = make(cross_attention_dim=12, **chosen)
    SHAAttentionPatch.wrap_model("sha", model).fuse()
    apply_rewrites(model, ["linear_to_conv2d", "gated_conv2d", "channel_layer_norm"])
    return model


def test_the_transformer_is_compared_in_place() -> None:
    model, call = prepared(), inputs()
    before = run(model, **call)
    (patch,) = ImageTransformer2DPatch.wrap_model("image", model).values()
    live = run(model, **call)
    with patch.disabled():
        assert torch.equal(run(model, **call), before)
    keys = list(model[0]._host.state_dict())
    patch.fuse()
    assert list(model[0].state_dict()) == keys
    assert close(live, before)
    assert torch.equal(run(model, **call), live)
    model[0].proj_out.weight.data.zero_()
    assert not close(run(model, **call), before)


def test_a_context_may_be_an_image() -> None:
    model, call = prepared(), inputs()
    reference = run(model, **call)
    ImageTransformer2DPatch.wrap_model("image", model).fuse()
    tokens = call["encoder_hidden_states"]
    image = tokens.transpose(1, 2).reshape(2, 12, 2, 3)
    assert close(run(model, **call | {"encoder_hidden_states": image}), reference)


def test_in_the_graph_only_norms_and_products_permute() -> None:
    model = prepared()
    ImageTransformer2DPatch.wrap_model("image", model).fuse()
    call = inputs()
    program = torch.export.export(model[0], (), {**call, "return_dict": False}, strict=False)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    shapes = [
        name for name in targets if any(op in name for op in ("reshape", "view", "flatten", "squeeze", "transpose"))
    ]
    assert len([name for name in shapes if "unsqueeze" in name]) == 1  # the text, once per attention to it
    assert len([name for name in shapes if "unsqueeze" not in name]) == 2  # into one row and back
    assert not any("linear" in name or "chunk" in name or "split" in name for name in targets)


class Louder(Transformer2DModel):
    """A subclass with a forward of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def _subclass() -> nn.Sequential:
    return nn.Sequential(Louder(2, 4, in_channels=8, norm_num_groups=2))


def _chunked() -> nn.Sequential:
    model = prepared()
    model[0].transformer_blocks[0].set_chunk_feed_forward(2)
    return model


def _unknown_entry() -> nn.Sequential:
    model = prepared()
    model[0].transformer_blocks[0].ff.net[0] = nn.Identity()
    return model


def _hooked() -> nn.Sequential:
    model = prepared()
    model[0].proj_in = nn.Linear(8, 8)
    return model


REFUSED: dict[str, Callable[[], nn.Sequential]] = {
    "its class Louder may compute something else": _subclass,
    "it takes patches or classes of pixels": lambda: make(
        patch_size=2, sample_size=4, norm_type="ada_norm_single", out_channels=8
    ),
    "`proj_in` is a Linear: apply LinearToConv2dPatch first": _hooked,
    "`norm1` is a LayerNorm: apply ChannelLayerNormPatch first": make,
    r"its norms are modulated \(ada_norm\)": lambda: make(norm_type="ada_norm", num_embeds_ada_norm=10),
    "GLIGEN": lambda: make(attention_type="gated", cross_attention_dim=12),
    "runs in chunks": _chunked,
    "the Identity of its feed-forward takes no images": _unknown_entry,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_transformers_of_another_kind_are_refused(reason: str) -> None:
    model = REFUSED[reason]()
    with pytest.raises(UnsupportedModelError, match=reason):
        ImageTransformer2DPatch.wrap_model("image", model)
    assert not any(isinstance(layer, PatchPluginContainer) for layer in model.modules())


class MyLinear(nn.Linear):
    """A subclass may compute anything."""


def _with_linear(linear: nn.Module) -> nn.Sequential:
    model = make(use_linear_projection=True)
    model[0].proj_in = linear
    return model


def test_layers_that_are_more_than_their_weights_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="it is a MyLinear, not a Linear"):
        LinearToConv2dPatch.wrap_model("conv", _with_linear(MyLinear(8, 8)))
    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(UnsupportedModelError, match="carries a hook"):
        LinearToConv2dPatch.wrap_model("conv", _with_linear(hooked))
    model = make()
    model[0].transformer_blocks[0].norm1 = nn.LayerNorm((3, 8))
    with pytest.raises(UnsupportedModelError, match="normalizes over 2 axes"):
        ChannelLayerNormPatch.wrap_model("norm", model)
    model = make()
    model[0].transformer_blocks[0].ff.net[0].proj = MyLinear(8, 64)
    with pytest.raises(UnsupportedModelError, match="its proj: it is a MyLinear"):
        GatedConv2dPatch.wrap_model("gated", model)


def test_layers_outside_of_image_transformers_stay() -> None:
    model = nn.ModuleDict({"transformer": make()[0], "proj_in": nn.Linear(2, 2), "norm1": nn.LayerNorm(2)})
    for patch in LEAVES:
        assert all(path.startswith("transformer.") for path in patch.wrap_model("rewrite", model))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.booleans())
@settings(deadline=None)
def test_a_convolution_takes_tokens_and_images(rows: int, columns: int, tokens: int, bias: bool) -> None:
    linear = nn.Linear(columns, rows, bias=bias).double()
    conv = PointwiseConv2d.from_rows(linear.weight, linear.bias)
    x = torch.randn(2, tokens, columns, dtype=torch.float64)
    image = x.transpose(1, 2).unsqueeze(-1)
    assert torch.allclose(conv(x), linear(x), rtol=1e-10, atol=1e-12)
    assert torch.allclose(conv(image)[..., 0].transpose(1, 2), linear(x), rtol=1e-10, atol=1e-12)


def test_a_norm_takes_tokens_and_images() -> None:
    norm = nn.LayerNorm(6, eps=1e-3, bias=False).double()
    channels = ChannelLayerNorm.from_layer_norm(norm)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    assert torch.equal(channels(x), norm(x))
    image = x.transpose(1, 2).reshape(2, 6, 2, 2)
    assert torch.allclose(channels(image).flatten(2).transpose(1, 2), norm(x), rtol=1e-10, atol=1e-12)
    assert channels.weight is norm.weight


def test_gates_of_approximate_gelu_are_no_gates() -> None:
    """diffusers calls x * sigmoid(1.702 x) `geglu-approximate`; there is nothing to cut in it."""
    model = make(activation_fn="geglu-approximate")
    assert not GatedConv2dPatch.concerns(model)
    paths = LinearToConv2dPatch.wrap_model("conv", model)
    assert "0.transformer_blocks.0.ff.net.0.proj" in paths
    assert isinstance(model[0].transformer_blocks[0].ff.net[0], ApproximateGELU)
