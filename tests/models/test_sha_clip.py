"""CLIP's attention per head: the same numbers, the same weights, causal for text."""

from typing import Any

import pytest
import torch
from attention_cases import LIMIT, relative_error
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPAttention

from sdconvert.mha2sha.head_counts import heads_from_config
from sdconvert.mha2sha.heads import attention_paths, head_splits, layer_heads, query_scales
from sdconvert.mha2sha.state_dict import split_state_dict
from sdconvert.models.attention import SHAAttentionPatch, folded_scales, unsupported_reason

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "projection_dim": 24,
}


# transformers computes the softmax of its own implementation in float32.
LIMITS = {"sdpa": LIMIT, "eager": 1e-6}


def text_model(implementation: str = "sdpa") -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(**SIZES, vocab_size=100, max_position_embeddings=20, eos_token_id=99)
    config._attn_implementation = implementation
    return CLIPTextModel(config).double().eval()


@torch.no_grad()
def answer(model: nn.Module, tokens: int = 20, **kwargs: Any) -> Tensor:
    torch.manual_seed(1)
    hidden: Tensor = model(input_ids=torch.randint(0, 99, (2, tokens)), **kwargs)[0]
    return hidden


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("fold_scale", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens", [20, 7])
def test_the_text_encoder_per_head_is_the_text_encoder(implementation: str, tokens: int, fold_scale: bool) -> None:
    model = text_model(implementation)
    reference = answer(model, tokens)
    group = SHAAttentionPatch.wrap_model("sha", model, fold_scale=fold_scale)
    assert len(group) == SIZES["num_hidden_layers"]
    assert relative_error(answer(model, tokens), reference) <= LIMITS[implementation]
    with group.plugins[0].disabled(), group.plugins[1].disabled():
        assert torch.equal(answer(model, tokens), reference)
    group.fuse()
    assert not any(isinstance(module, CLIPAttention) for module in model.modules())
    assert relative_error(answer(model, tokens), reference) <= LIMITS[implementation]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_mask_of_the_padding_hides_it(implementation: str) -> None:
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, 5:] = 0
    model = text_model(implementation)
    reference = answer(model, attention_mask=mask)
    assert relative_error(answer(model), reference) > 1e-3
    SHAAttentionPatch.wrap_model("sha", model).fuse()
    kept = mask.bool()
    assert relative_error(answer(model, attention_mask=mask)[kept], reference[kept]) <= LIMITS[implementation]


def test_the_vision_encoder_looks_ahead() -> None:
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=8, patch_size=4)).double().eval()
    pixels = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        reference = model(pixels)[0]
        SHAAttentionPatch.wrap_model("sha", model).fuse()
        assert relative_error(model(pixels)[0], reference) <= LIMIT


def test_the_rename_map_is_the_patch_s() -> None:
    model = text_model()
    config = model.config.to_dict()
    heads = heads_from_config(config, attention_paths(shapes(model)), shapes(model))
    splits = head_splits(shapes(model), heads)
    assert {(one.query, one.key_value, one.dim_head) for one in layer_heads(splits).values()} == {(3, 3, 8)}
    expected = split_state_dict(dict(model.state_dict()), splits)
    group = SHAAttentionPatch.wrap_model("sha", model, fold_scale=True)
    assert folded_scales(group) == query_scales(splits)
    group.fuse()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    scales = query_scales(splits)
    assert all(torch.equal(found[name], expected[name] * scales.get(name, 1.0)) for name in found)


def test_what_cannot_be_cut_is_refused() -> None:
    attn = text_model().get_submodule("encoder.layers.0.self_attn")
    assert unsupported_reason(attn) is None
    attn.k_proj.register_forward_hook(lambda *_: None)
    assert "its k_proj carries a hook" in str(unsupported_reason(attn))

    class Negative(CLIPAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return -super().forward(*args, **kwargs)[0], None

    attn.__class__ = Negative
    assert "Negative has a forward of its own" in str(unsupported_reason(attn))
