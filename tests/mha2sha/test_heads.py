"""Which rows become which head's: for every model, from its config, or refused with the layer's name."""

from typing import Any

import pytest
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from static_graphs import SMALL_UNET, golden_case, small_case, vae_case

from sdconvert.adapters import adapter_for
from sdconvert.errors import CheckpointError, UsageError
from sdconvert.mha2sha.heads import attention_paths, head_splits, heads_from_config

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


@given(st.integers(1, 12), st.integers(1, 80))
def test_the_heads_rows_cover_the_parent_once_and_in_order(heads: int, rows: int) -> None:
    (split,) = head_splits({f"{LAYER}.to_q.weight": (heads * rows, 6)}, {LAYER: heads})
    covered = [row for part in split for row in range(heads * rows)[part.rows]]
    assert covered == list(range(heads * rows))
    names = [part.name for part in split]
    assert names == [f"{LAYER}.to_q_convs.{head}.weight" for head in range(heads)]


@pytest.mark.parametrize(
    ("graph", "variant"),
    [("unet", "pasd"), ("unet", "pasd_light"), ("controlnet", "pasd"), ("controlnet", "pasd_rrdb")],
)
def test_config_and_model_agree_on_the_heads(graph: str, variant: str) -> None:
    adapter = golden_case(graph, variant).adapter
    expected = {layer.path: layer.heads for layer in adapter.attention_layers()}
    assert heads_from_config(adapter.config(), attention_paths(adapter.model.state_dict())) == expected


@pytest.mark.parametrize("heads", [[2, 4], [4, 2], 1])
def test_config_and_model_agree_on_heads_per_block(heads: Any) -> None:
    adapter = small_case(SMALL_UNET | {"attention_head_dim": heads}).adapter
    expected = {layer.path: layer.heads for layer in adapter.attention_layers()}
    assert heads_from_config(adapter.config(), attention_paths(adapter.model.state_dict())) == expected


def config(**changes: Any) -> dict[str, Any]:
    return {"_class_name": "X", "down_block_types": ["A", "B", "C"], "attention_head_dim": [1, 2, 3], **changes}


@pytest.mark.parametrize(
    ("layer", "heads"),
    [("down_blocks.0.a", 1), ("down_blocks.2.a", 3), ("up_blocks.0.a", 3), ("up_blocks.2.a", 1), ("mid_block.a", 3)],
)
def test_up_blocks_take_the_list_backwards_and_the_mid_block_its_last(layer: str, heads: int) -> None:
    assert heads_from_config(config(), [layer]) == {layer: heads}
    assert heads_from_config(config(num_attention_heads=5), [layer]) == {layer: 5}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"attention_head_dim": None}, UsageError, "config.json of a X names no heads per block"),
        ({"down_block_types": []}, UsageError, "names no heads per block"),
        ({"attention_head_dim": [1, 2]}, CheckpointError, r"heads of 2 blocks, \[1, 2\], but 3 blocks"),
    ],
)
def test_a_config_that_does_not_say_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        heads_from_config(config(**changes), ["mid_block.a"])


@pytest.mark.parametrize("layer", ["down_blocks.3.a", "encoder.a", "down_blocks.x.a", "a"])
def test_a_layer_in_no_block_is_refused(layer: str) -> None:
    with pytest.raises(CheckpointError, match=f"attention layer `{layer}` is in no block"):
        heads_from_config(config(), [layer])


def shapes(*projections: str, rows: int = 8) -> dict[str, tuple[int, ...]]:
    return {f"{LAYER}.{name}.weight": (rows, 6) for name in projections or ("to_q", "to_k", "to_v")}


def test_splits_follow_the_order_of_the_state_dict() -> None:
    found = head_splits({"conv_in.weight": (3, 3), **shapes(), f"{LAYER}.to_v.bias": (8,)}, {LAYER: 4})
    assert [split.parent for split in found] == [*shapes(), f"{LAYER}.to_v.bias"]
    assert {(len(split.parts), split.rows) for split in found} == {(4, 8)}


@pytest.mark.parametrize(
    ("given_shapes", "heads", "message"),
    [
        (shapes(rows=9), {LAYER: 4}, r"to_q\.weight` has 9 rows, which 4 heads do not divide"),
        (shapes(), {LAYER: 0}, "which 0 heads do not divide"),
        (shapes(), {LAYER + "x": 4}, f"no head count for attention layer `{LAYER}`"),
        (shapes(), {LAYER: 4, "gone": 4}, "head counts for layers that do not exist: gone"),
        ({"conv_in.weight": (3, 3)}, {}, "the weights hold no attention"),
        ({}, {}, "the weights hold no attention"),
        (
            {f"{LAYER}.to_q_convs.0.weight": (2, 6, 1, 1), "a.to_k_convs.1.bias": (2,)},
            {},
            "in SHA form already: .* 1 more",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(
    given_shapes: dict[str, tuple[int, ...]], heads: dict[str, int], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        head_splits(given_shapes, heads)


def test_a_layer_without_a_count_gets_the_nearest_known_name() -> None:
    with pytest.raises(CheckpointError) as error:
        head_splits(shapes(), {LAYER + "x": 4})
    assert error.value.hint == f"nearest known: `{LAYER}x`"


def test_a_decoder_s_attention_is_in_no_block() -> None:
    adapter = vae_case().adapter
    with pytest.raises(CheckpointError, match="is in no block of the config"):
        heads_from_config(adapter.config() | {"attention_head_dim": 1}, attention_paths(adapter.model.state_dict()))


def test_a_transformer_has_one_count_for_all_layers() -> None:
    torch.manual_seed(0)
    model: Any = PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=4, num_layers=2, cross_attention_dim=12, sample_size=8
    )
    adapter = adapter_for(model)
    expected = {layer.path: layer.heads for layer in adapter.attention_layers()}
    assert heads_from_config(adapter.config(), attention_paths(model.state_dict())) == expected
    assert set(expected.values()) == {3}
