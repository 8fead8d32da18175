"""Every option of diffusers' attention: both explicit forms compute what diffusers' processor computes, in fp64."""

import copy
from typing import Any

import pytest
import torch
from attention_cases import CASES, CONTEXT, CROSS, LIMIT, AttentionCase, biases, in_model, relative_error
from diffusers.models import attention_processor as of_diffusers
from diffusers.models.attention_processor import Attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sdconvert.errors import UnsupportedModelError
from sdconvert.mha2sha.heads import head_splits, query_scales
from sdconvert.mha2sha.state_dict import split_state_dict
from sdconvert.models.attention import SHAAttentionPatch, folded_scales, per_head, unsupported_reason
from sdconvert.models.attention_processors import ExplicitAttnProcessor, rewrite_of
from sdconvert.models.convolutions import PointwiseConv2d


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> AttentionCase:
    return CASES[request.param]


@torch.no_grad()
def test_both_forms_compute_what_diffusers_computes(case: AttentionCase) -> None:
    attn, call = case.layer(), case.call()
    reference = attn(**call)
    assert unsupported_reason(attn) is None
    assert relative_error(per_head(attn)(**call), reference) <= LIMIT
    attn.processor = rewrite_of(attn).explicit_processor()
    assert relative_error(attn(**call), reference) <= LIMIT
    assert relative_error(per_head(attn)(**call), reference) <= LIMIT


@torch.no_grad()
def test_the_rename_map_gives_the_state_of_the_form_per_head(case: AttentionCase) -> None:
    model, call = in_model(case.layer()), case.call()
    layer: Any = model["attn"]
    state, reference = dict(model.state_dict()), layer(**call)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    expected = split_state_dict(state, head_splits(shapes, {"attn": layer.heads}))
    SHAAttentionPatch.wrap_model("sha", model).fuse()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter)
    model.load_state_dict(expected, strict=True)
    assert relative_error(model["attn"](**call), reference) <= LIMIT


@torch.no_grad()
def test_both_forms_survive_a_deep_copy(case: AttentionCase) -> None:
    attn, call = case.layer(), case.call()
    attn.processor = rewrite_of(attn).explicit_processor()
    for form in (per_head(attn), attn):
        copied = copy.deepcopy(form)
        assert torch.equal(copied(**call), form(**call))
        assert not {one.data_ptr() for one in copied.parameters()} & {one.data_ptr() for one in form.parameters()}


EXPORTED = ("VAE", "cross_attention_norm group", "mask of each query", "2 heads for keys", "fused and normalized")


@pytest.mark.parametrize(
    "name", [*EXPORTED, *(name for name in CASES if name.startswith("added KV") and "2_0" in name)]
)
@torch.no_grad()
def test_both_forms_survive_export(name: str) -> None:
    attn, call = CASES[name].layer(), CASES[name].call(batch=1)
    attn.processor = rewrite_of(attn).explicit_processor()
    for form in (per_head(attn), attn):
        exported = torch.export.export(form, (), call, strict=False)
        assert relative_error(exported.module()(**call), form(**call)) <= LIMIT


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.options.get("qk_norm")])
@torch.no_grad()
def test_the_scale_can_go_into_the_weights(name: str) -> None:
    model, call = in_model(CASES[name].layer()), CASES[name].call()
    layer: Any = model["attn"]
    reference, scale, state = layer(**call), rewrite_of(layer).scores().scale, dict(model.state_dict())
    splits = head_splits({key: tuple(one.shape) for key, one in state.items()}, {"attn": layer.heads})
    group = SHAAttentionPatch.wrap_model("sha", model, fold_scale=True)
    factors = folded_scales(group)
    group.fuse()
    assert relative_error(model["attn"](**call), reference) <= LIMIT
    assert factors == dict.fromkeys(query_scales(splits), scale)
    if scale != 1:
        assert factors == query_scales(splits)
    plain = split_state_dict(state, splits)
    folded = {key: tensor * factors[key] if key in factors else tensor for key, tensor in plain.items()}
    assert all(torch.equal(tensor, folded[key]) for key, tensor in model.state_dict().items())
    assert all(torch.equal(state[key], before) for key, before in in_model(CASES[name].layer()).state_dict().items())


def ops(module: nn.Module, call: dict[str, Tensor]) -> list[str]:
    """The ops between the projections, by the names of encodings."""
    shown = ("mul", "matmul", "add", "softmax", "cat", "div")
    program = torch.export.export(module, (), call, strict=False)
    names = [str(node.target).split(".")[1] for node in program.graph.nodes if node.op == "call_function"]
    return [name for name in names if name in shown]


def test_names_of_tensors_follow_from_the_ops() -> None:
    plain, masked, vae = CASES["self"], CASES["mask"], CASES["VAE"]
    explicit = plain.layer()
    explicit.processor = ExplicitAttnProcessor()
    head = ["mul", "matmul", "softmax", "matmul"]
    assert ops(explicit, plain.call(1)) == head
    assert ops(per_head(explicit), plain.call(1)) == head * 4 + ["cat"]
    assert ops(per_head(masked.layer()), masked.call(1)) == ["mul", "matmul", "add", "softmax", "matmul"] * 4 + ["cat"]
    assert ops(per_head(vae.layer()), vae.call(1)) == [*head, "cat", "add", "div"]
    folded: Any = per_head(plain.layer())
    folded.fold_scale()
    assert ops(folded, plain.call(1)) == head[1:] * 4 + ["cat"]
    added = CASES["added KV AttnAddedKVProcessor2_0"]
    assert ops(per_head(added.layer()), added.call(1)) == (["cat", "cat", *head] * 4 + ["cat", "add"])


@st.composite
def grouped(draw: st.DrawFn) -> AttentionCase:
    """Layers of all sizes, whose heads share keys and values or do not."""
    kv_heads, shared = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    heads, dim_head = kv_heads * shared, draw(st.integers(1, 7))
    sized = [of_diffusers.AttnProcessor, of_diffusers.AttnProcessor2_0] if shared == 1 else []
    processor = draw(st.sampled_from([*sized, of_diffusers.StableAudioAttnProcessor2_0]))
    options = {"heads": heads, "dim_head": dim_head, "kv_heads": kv_heads, **draw(st.sampled_from([{}, CROSS]))}
    change = biases(**{name: draw(st.booleans()) for name in ("to_q", "to_k", "to_v")})
    context = CONTEXT if "cross_attention_dim" in options else None
    return AttentionCase(options, processor, context=context, mask=draw(st.sampled_from([None, 0, 1])), change=change)


@settings(deadline=None, max_examples=60)
@given(grouped())
def test_sizes_biases_and_shared_heads(case: AttentionCase) -> None:
    test_both_forms_compute_what_diffusers_computes.__wrapped__(case)
    test_the_rename_map_gives_the_state_of_the_form_per_head.__wrapped__(case)


@pytest.mark.parametrize("option", ["upcast_attention", "upcast_softmax"])
@pytest.mark.parametrize("obeys", [True, False])
@torch.no_grad()
def test_half_precision_is_upcast_where_the_processor_does_so(option: str, obeys: bool) -> None:
    processor = of_diffusers.AttnProcessor() if obeys else of_diffusers.AttnProcessor2_0()
    torch.manual_seed(0)
    attn = Attention(16, heads=2, dim_head=8, processor=processor, **{option: True}).half()
    hidden = torch.randn(1, 5, 16).half()
    scores = rewrite_of(attn).scores()
    assert (scores.upcast_attention, scores.upcast_softmax) == tuple(
        obeys and option == name for name in ("upcast_attention", "upcast_softmax")
    )
    reference = attn(hidden)
    explicit = copy.deepcopy(attn)
    explicit.processor = rewrite_of(attn).explicit_processor()
    for form in (per_head(attn), explicit):
        assert form(hidden).dtype == torch.float16
        assert relative_error(form(hidden), reference) <= 4e-3


@torch.no_grad()
def test_scores_beyond_half_precision_are_finite_with_upcast_attention() -> None:
    attn = Attention(16, heads=2, dim_head=8, processor=of_diffusers.AttnProcessor(), upcast_attention=True)
    for linear in (attn.to_q, attn.to_k):
        linear.weight.data = 60 * torch.eye(16)
    hidden = 40 * torch.randn(1, 5, 16)
    sha: Any = per_head(attn.half())
    assert sha(hidden.half()).isfinite().all()
    sha.scores = type(sha.scores)(sha.scores.scale)
    assert not sha(hidden.half()).isfinite().all()


def test_an_output_projection_may_be_a_convolution() -> None:
    for case in (CASES["cross"], CASES["VAE"]):
        attn, call = case.layer(), case.call()
        with torch.no_grad():
            reference = attn(**call)
            linear = attn.to_out[0]
            conv = nn.Conv2d(linear.in_features, linear.out_features, 1, dtype=torch.float64)
            conv.weight.data, conv.bias.data = linear.weight[..., None, None], linear.bias
            attn.to_out[0] = conv
            attn.processor = rewrite_of(attn).explicit_processor()
            assert relative_error(attn(**call), reference) <= LIMIT
            assert relative_error(per_head(attn)(**call), reference) <= LIMIT


@pytest.mark.parametrize("output", [nn.Linear, nn.Conv2d, PointwiseConv2d])
@pytest.mark.parametrize("name", ["self", "cross", "cross_attention_norm group", "2 heads for keys"])
@torch.no_grad()
def test_images_and_tokens_are_the_same_values(name: str, output: type[nn.Module]) -> None:
    attn, call = CASES[name].layer(), CASES[name].call()
    linear = attn.to_out[0]
    if output is not nn.Linear:
        conv = output(linear.in_features, linear.out_features, 1).double()
        conv.weight.data, conv.bias.data = linear.weight[..., None, None], linear.bias
        attn.to_out[0] = conv
    sha: Any = per_head(attn)
    hidden, context = call["hidden_states"], call.get("encoder_hidden_states")
    reference = sha(hidden, context)
    for size in ((1, 6), (3, 2)):
        image = hidden.transpose(1, 2).reshape(2, -1, *size)
        for seen in (context, None if context is None else context.transpose(1, 2).unsqueeze(2)):
            found = sha(image, seen)
            assert relative_error(found, reference.transpose(1, 2).reshape(found.shape)) <= LIMIT
            assert relative_error(sha(hidden, seen), reference) <= LIMIT


def test_a_layer_without_output_projection_gives_its_heads() -> None:
    case = AttentionCase({"pre_only": True})
    attn, call = case.layer(), case.call()
    with torch.no_grad():
        sha = per_head(attn)(**call)
        attn.processor = rewrite_of(attn).explicit_processor()
        reference = attn(**call)
        assert relative_error(sha, reference) <= LIMIT
        attn.to_out = nn.ModuleList([nn.Identity(), nn.Identity()])
        attn.processor = of_diffusers.AttnProcessor()
        assert relative_error(sha, attn(**call)) <= LIMIT


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("self", {"attention_mask": torch.zeros(2, 6)}, r"not torch.float32 \(2, 6\)"),
        ("self", {"attention_mask": torch.ones(2, 1, 6, dtype=torch.bool)}, r"not torch.bool \(2, 1, 6\)"),
        ("self", {"attention_mask": torch.zeros(8, 1, 6)}, r"not torch.float32 \(8, 1, 6\)"),
        ("image", {"attention_mask": torch.zeros(2, 5, 6)}, r"not torch.float32 \(2, 5, 6\)"),
        ("spatial_norm", {"temb": None}, "takes an image .* and temb, not a 4-D input and no temb"),
        ("1 heads for keys", {"rotary_emb": (torch.ones(6, 2), torch.ones(6, 2))}, "takes no rotary_emb"),
        ("added KV AttnAddedKVProcessor", {"hidden_states": torch.zeros(2, 16, 6)}, "takes an image .*, and got a 3-D"),
        (
            "added KV AttnAddedKVProcessor",
            {"attention_mask": torch.zeros(2, 1, 9)},
            "is for 9 tokens, and the text has 7",
        ),
    ],
)
def test_calls_that_no_form_has_a_place_for_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    attn, call = CASES[name].layer(), CASES[name].call() | change
    with pytest.raises(UnsupportedModelError, match=message):
        per_head(attn)(**call)
    if "rotary_emb" not in change:
        attn.processor = rewrite_of(attn).explicit_processor()
        with pytest.raises(UnsupportedModelError, match=message):
            attn(**call)


def test_arguments_of_none_ask_for_nothing() -> None:
    case = CASES["2 heads for keys"]
    sha = per_head(case.layer())
    assert torch.equal(sha(**case.call(), rotary_emb=None), sha(**case.call()))


def test_the_scale_is_folded_once_and_never_before_a_norm() -> None:
    plain: Any = per_head(CASES["self"].layer())
    plain.fold_scale()
    with pytest.raises(UnsupportedModelError, match="in the weights of to_q already"):
        plain.fold_scale()
    normalized: Any = per_head(CASES["qk_norm l2"].layer())
    with pytest.raises(UnsupportedModelError, match="qk_norm would take it out"):
        normalized.fold_scale()
