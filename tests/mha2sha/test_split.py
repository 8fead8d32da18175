"""The algebra of the split: heads put together again are the parent, bit by bit."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdconvert.mha2sha.heads import PROJECTIONS, head_splits
from sdconvert.mha2sha.state_dict import split_state_dict

LAYERS = ("down_blocks.0.attn1", "mid_block.attn2")


@st.composite
def attentions(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, int]]:
    """A state dict with two attention layers among other weights, and their heads."""
    state: dict[str, Tensor] = {"conv_in.weight": torch.randn(3, 2, 3, 3)}
    heads = {}
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    for layer in LAYERS:
        heads[layer] = draw(st.integers(1, 6))
        rows = heads[layer] * draw(st.integers(1, 5))
        for projection in PROJECTIONS:
            state[f"{layer}.{projection}.weight"] = torch.randn(rows, draw(st.integers(1, 7)), dtype=dtype)
            if draw(st.booleans()):
                state[f"{layer}.{projection}.bias"] = torch.randn(rows, dtype=dtype)
        state[f"{layer}.to_out.0.weight"] = torch.randn(4, rows, dtype=dtype)
    return state, heads


def splits(state: dict[str, Tensor], heads: dict[str, int]) -> Any:
    return head_splits({key: tuple(tensor.shape) for key, tensor in state.items()}, heads)


@given(attentions())
@settings(max_examples=60, deadline=None)
def test_heads_put_together_are_the_parent(drawn: tuple[dict[str, Tensor], dict[str, int]]) -> None:
    state, heads = drawn
    before = {key: tensor.clone() for key, tensor in state.items()}
    cuts = splits(state, heads)
    result = split_state_dict(state, cuts)
    assert all(torch.equal(state[key], before[key]) for key in before)
    for cut in cuts:
        assert cut.parent not in result
        parts = [result[part.name] for part in cut]
        if cut.to_convolution:
            assert {part.shape[2:] for part in parts} == {(1, 1)}
            parts = [part[:, :, 0, 0] for part in parts]
        assert torch.equal(torch.cat(parts), state[cut.parent])
        assert parts[0].dtype == state[cut.parent].dtype
        assert parts[0].data_ptr() == state[cut.parent].data_ptr()
    untouched = state.keys() - {cut.parent for cut in cuts}
    assert {key for key in result if "_convs." not in key} == untouched
    assert all(result[key] is state[key] for key in untouched)


@given(attentions())
@settings(max_examples=20, deadline=None)
def test_heads_stand_where_their_parent_stood(drawn: tuple[dict[str, Tensor], dict[str, int]]) -> None:
    state, heads = drawn
    parents = {part.name: cut.parent for cut in splits(state, heads) for part in cut}
    order = [parents.get(key, key) for key in split_state_dict(state, splits(state, heads))]
    assert list(dict.fromkeys(order)) == list(state)
    assert sorted(order, key=list(state).index) == order
