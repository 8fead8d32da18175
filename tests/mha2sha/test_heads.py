"""Which rows become which head's: for every set of projections, or refused with all layers' names."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdconvert.errors import CheckpointError
from sdconvert.mha2sha.heads import (
    CUT_INTO,
    LayerHeads,
    attention_paths,
    head_splits,
    layer_heads,
    plan_splits,
    query_scales,
)

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
Shapes = dict[str, tuple[int, ...]]

SETS = {
    "plain": ("to_q", "to_k", "to_v"),
    "fused self": ("to_qkv",),
    "fused cross": ("to_q", "to_kv"),
    "added": ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj"),
    "text only": ("to_q", "add_k_proj", "add_v_proj"),
    "clip": ("k_proj", "v_proj", "q_proj"),
}


def weights(rows: dict[str, int], bias: bool = False, layer: str = LAYER) -> Shapes:
    """Shapes of the projections of a layer by their rows."""
    kinds: dict[str, tuple[int, ...]] = {"weight": (6,)} | ({"bias": ()} if bias else {})
    return {f"{layer}.{name}.{kind}": (count, *rest) for name, count in rows.items() for kind, rest in kinds.items()}


def plain(rows: int = 8, *names: str) -> Shapes:
    return weights(dict.fromkeys(names or SETS["plain"], rows))


@given(
    st.sampled_from(sorted(SETS)), st.integers(1, 6), st.integers(1, 3), st.integers(1, 20), st.booleans(), st.data()
)
def test_the_heads_rows_cover_each_parent_once_and_in_order(
    projections: str, kv_heads: int, shared: int, dim_head: int, bias: bool, data: st.DataObject
) -> None:
    names = SETS[projections]
    shared = 1 if "to_qkv" in names else shared
    count = {"to_q": kv_heads * shared, "q_proj": kv_heads * shared}
    rows = {name: sum(count.get(one, kv_heads) for one in CUT_INTO[name]) * dim_head for name in names}
    others: Shapes = {"conv_in.weight": (3, 3), f"{LAYER}.to_out.0.weight": (8, 8)}
    shapes = dict(data.draw(st.permutations([*others.items(), *weights(rows, bias).items()])))
    splits = head_splits(shapes, {LAYER: kv_heads * shared})
    assert [split.parent for split in splits] == [key for key in shapes if key not in others]
    for split in splits:
        assert [row for part in split for row in range(split.rows)[part.rows]] == list(range(shapes[split.parent][0]))
        assert {part.stop - part.start for part in split} == {dim_head}
        assert split.to_convolution == split.parent.endswith("weight")
    children = [part.name for split in splits for part in split]
    assert len(set(children)) == len(children)
    per_projection = {one: count.get(one, kv_heads) for name in names for one in CUT_INTO[name]}
    assert set(children) == {
        f"{LAYER}.{name}_convs.{head}.{kind}"
        for name, heads in per_projection.items()
        for head in range(heads)
        for kind in (("weight", "bias") if bias else ("weight",))
    }
    assert layer_heads(splits) == {LAYER: LayerHeads(kv_heads * shared, kv_heads, dim_head)}
    queries = {name for name in children if "to_q_convs" in name or "q_proj_convs" in name}
    assert query_scales(splits) == dict.fromkeys(queries, dim_head**-0.5)


def test_fused_rows_are_queries_then_keys_then_values() -> None:
    (split,) = head_splits(weights({"to_qkv": 12}), {LAYER: 2})
    assert [(part.name.removeprefix(f"{LAYER}."), part.start, part.stop) for part in split] == [
        *(("to_q_convs.0.weight", 0, 2), ("to_q_convs.1.weight", 2, 4)),
        *(("to_k_convs.0.weight", 4, 6), ("to_k_convs.1.weight", 6, 8)),
        *(("to_v_convs.0.weight", 8, 10), ("to_v_convs.1.weight", 10, 12)),
    ]


def test_paths_are_those_of_all_projections_in_order() -> None:
    keys = ["b.to_qkv.weight", "conv.weight", "a.to_k.weight", "a.to_q.bias", "text.self_attn.q_proj.weight"]
    assert attention_paths(keys) == ["b", "a", "text.self_attn"]


@pytest.mark.parametrize(
    ("shapes", "heads", "message"),
    [
        (plain(9), {LAYER: 4}, r"to_q\.weight` has 9 rows, which 4 heads do not divide"),
        (plain(), {LAYER: 0}, "which 0 heads do not divide"),
        (weights({"to_qkv": 8}), {LAYER: 2}, "has 8 rows, which 3 times 2 heads do not divide"),
        (plain(), {LAYER + "x": 4}, f"no head count for attention layer `{LAYER}`"),
        (plain(), {LAYER: 4, "gone": 4}, "head counts for layers that do not exist: gone"),
        ({"conv_in.weight": (3, 3)}, {}, "the weights hold no attention"),
        ({}, {}, "the weights hold no attention"),
        ({"mid.0.proj_attn.weight": (3, 3)}, {}, "deprecated names query, key, value"),
        (
            {f"{LAYER}.to_q_convs.0.weight": (2, 6, 1, 1), "a.to_k_convs.1.bias": (2,)},
            {},
            "in SHA form already: .* 1 more",
        ),
        (plain(8, "to_q", "to_k"), {LAYER: 4}, f"`{LAYER}` has no whole set of projections: look for to_v"),
        (plain(8, "to_k", "to_v"), {LAYER: 4}, "look for to_q"),
        (plain(8, "to_q", "add_k_proj"), {LAYER: 4}, "look for add_v_proj"),
        ({f"{LAYER}.to_q.bias": (8,)}, {LAYER: 4}, "look for to_k, to_q, to_v"),
        (plain() | weights({"to_qkv": 24}), {LAYER: 4}, "holds to_qkv and also to_q, to_k, to_v, of which it is made"),
        (plain() | weights({"to_kv": 16}), {LAYER: 4}, "holds to_kv and also to_k, to_v"),
        (plain() | plain(8, "q_proj"), {LAYER: 4}, "look for"),
        (weights({"to_q": 8, "to_k": 6, "to_v": 6}), {LAYER: 2}, r"to_k\.weight` has 6 rows, no fit for 2 heads of 4"),
        (weights({"to_q": 12, "to_k": 8, "to_v": 8}), {LAYER: 3}, "has 8 rows, no fit for 3 heads of 4 rows"),
        (weights({"to_q": 8, "to_k": 4, "to_v": 8}), {LAYER: 2}, "different numbers of rows: to_k 4, to_v 8"),
        (weights({"to_q": 8, "to_kv": 6}), {LAYER: 2}, r"to_kv\.weight` has 6 rows, no fit"),
        (plain() | {f"{LAYER}.to_k.weight": (8, 6, 1, 1)}, {LAYER: 2}, r"to_k\.weight` is no matrix: .*\(8, 6, 1, 1\)"),
        (plain() | {f"{LAYER}.to_k.weight": ()}, {LAYER: 2}, r"to_k\.weight` has 0 rows, no fit"),
        (plain() | {f"{LAYER}.to_k.bias": (7,)}, {LAYER: 2}, r"to_k\.bias` has the shape \(7,\), beside .* 8 rows"),
        (
            plain() | {f"{LAYER}.norm_q.weight": (8,)},
            {LAYER: 2},
            "normalizes across heads .*: norm_q needs all 2 heads",
        ),
        (plain() | {f"{LAYER}.add_q_proj.weight": (8, 6)}, {LAYER: 2}, "jointly .it has add_q_proj.weight"),
        (plain() | {f"{LAYER}.processor.to_k_ip.0.weight": (8, 6)}, {LAYER: 2}, "weights of its own, .*to_k_ip"),
    ],
)
def test_what_cannot_be_split_is_refused(shapes: Shapes, heads: dict[str, int], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        head_splits(shapes, heads)


def test_norms_of_single_heads_are_no_obstacle() -> None:
    assert len(head_splits(plain() | {f"{LAYER}.norm_q.weight": (4,), f"{LAYER}.norm_k.weight": (4,)}, {LAYER: 2})) == 3


def test_all_that_stands_against_a_split_is_in_one_message() -> None:
    shapes = plain(9) | weights({"to_q": 8}, layer="b") | weights({"to_q": 8, "to_k": 8, "to_v": 8}, layer="c")
    with pytest.raises(CheckpointError) as error:
        head_splits(shapes, {LAYER: 4, "b": 2})
    lines = error.value.args[0].splitlines()
    assert lines[0] == "3 things of the attention layers stand against a split:"
    assert [line.count(name) for line, name in zip(lines[1:], (LAYER, "`b`", "`c`"), strict=True)] == [1, 1, 1]
    assert "check num_attention_heads" in error.value.hint
    assert "is the weights file whole?" in error.value.hint


def test_layers_that_cannot_be_cut_may_be_left_alone_with_the_reason() -> None:
    good = weights(dict.fromkeys(SETS["plain"], 8), layer="good")
    joint = weights(dict.fromkeys((*SETS["plain"], "add_q_proj"), 8), layer="joint")
    splits, left_alone = plan_splits(good | joint | plain(9), {"good": 2, "joint": 2, LAYER: 4})
    assert splits == head_splits(good, {"good": 2})
    assert left_alone.keys() == {"joint", LAYER}
    assert "jointly" in left_alone["joint"]
    assert "which 4 heads do not divide" in left_alone[LAYER]
    assert plan_splits(good, {"good": 2})[1] == {}
    with pytest.raises(CheckpointError, match="jointly"):
        plan_splits(joint, {"joint": 2})


def test_a_layer_without_a_count_gets_the_nearest_known_name() -> None:
    with pytest.raises(CheckpointError) as error:
        head_splits(plain(), {LAYER + "x": 4})
    assert error.value.hint == f"nearest known: `{LAYER}x`"


@given(st.dictionaries(st.sampled_from(sorted(CUT_INTO)), st.integers(0, 12)), st.integers(-1, 4))
def test_whatever_the_rows_a_split_is_whole_or_refused(rows: dict[str, int], heads: int) -> None:
    shapes: Any = weights(rows)
    try:
        splits = head_splits(shapes, {LAYER: heads})
    except CheckpointError:
        return
    assert {split.parent: split.rows for split in splits} == {key: shape[0] for key, shape in shapes.items()}
