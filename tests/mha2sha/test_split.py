"""The algebra of the split: heads put together again are the parent, bit by bit, and encodings go with their rows."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdconvert.errors import EncodingsError
from sdconvert.mha2sha.encodings import split_activations, split_parameters
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


def entry(scale: float, bitwidth: int = 8) -> dict[str, Any]:
    bound = scale * 2 ** (bitwidth - 1)
    return {
        "bitwidth": bitwidth,
        "dtype": "int",
        "is_symmetric": "True",
        "max": bound - scale,
        "min": -bound,
        "offset": -(2 ** (bitwidth - 1)),
        "scale": scale,
    }


@given(attentions(), st.sampled_from([4, 8]))
@settings(max_examples=40, deadline=None)
def test_entries_per_channel_are_sliced_as_the_rows_and_one_entry_is_repeated(
    drawn: tuple[dict[str, Tensor], dict[str, int]], bitwidth: int
) -> None:
    state, heads = drawn
    cuts = splits(state, heads)
    channels = {
        key: [entry(1 + k, bitwidth) for k in range(tensor.shape[0])]
        for key, tensor in state.items()
        if key.endswith("weight")
    }
    whole = {key: entries[:1] for key, entries in channels.items()}
    sliced = split_parameters(channels, cuts, list(state))
    repeated = split_parameters(whole, cuts, list(state))
    parts = split_state_dict(state, cuts)
    assert list(sliced) == list(repeated) == [key for key in parts if key.endswith("weight")]
    for key, entries in sliced.items():
        assert len(entries) == parts[key].shape[0]
    for cut in (cut for cut in cuts if cut.to_convolution):
        assert [e for part in cut for e in sliced[part.name]] == channels[cut.parent]
        assert all(repeated[part.name] == whole[cut.parent] for part in cut)


@given(attentions(), st.data())
@settings(max_examples=30, deadline=None)
def test_a_list_of_another_length_is_refused(
    drawn: tuple[dict[str, Tensor], dict[str, int]], data: st.DataObject
) -> None:
    state, heads = drawn
    key = f"{LAYERS[0]}.to_k.weight"
    rows = state[key].shape[0]
    count = data.draw(st.integers(2, 40).filter(lambda n: n != rows))
    with pytest.raises(EncodingsError, match=rf"`{key}` has {count} encodings: neither 1 .* nor {rows}"):
        split_parameters({key: [entry(1.0, 4)] * count}, splits(state, heads), list(state))


def test_an_entry_for_no_parameter_gets_the_nearest_name() -> None:
    state = {f"{LAYERS[0]}.to_q.weight": torch.zeros(4, 2)}
    with pytest.raises(EncodingsError, match=r"1 encodings are for no parameter .* `down_blocks\.0\.attn1\.to_z") as e:
        split_parameters({f"{LAYERS[0]}.to_z.weight": [entry(1.0)]}, splits(state, {LAYERS[0]: 2}), list(state))
    assert e.value.hint == "nearest parameter: `down_blocks.0.attn1.to_q.weight`"


POSITIONS = {
    name: entry(1.0 + k)
    for k, name in enumerate(("matmul.0", "matmul.0.second", "mul.0", "softmax.0", "matmul.1", "matmul.1.second"))
}


@given(st.integers(1, 9))
def test_every_head_inherits_its_parent_s_ranges(heads: int) -> None:
    state = {f"{LAYERS[0]}.{name}.weight": torch.zeros(heads, 2) for name in PROJECTIONS}
    projections = {f"{LAYERS[0]}.{name}": {"output": {"0": entry(k)}} for k, name in enumerate(PROJECTIONS)}
    sections = {
        "activation_encodings": {"conv_in": {"output": {"0": entry(9)}}, **projections},
        "functional_encodings": {LAYERS[0]: POSITIONS, "mid_block": {"add.0": entry(8)}},
    }
    result = split_activations(sections, splits(state, {LAYERS[0]: heads}))
    functional = result["functional_encodings"]
    assert functional["mid_block"] == sections["functional_encodings"]["mid_block"]
    per_head = functional[LAYERS[0]]
    assert len(per_head) == 6 * heads + 1
    for head in range(heads):
        assert per_head[f"matmul.{2 * head}"] == POSITIONS["matmul.0"]
        assert per_head[f"matmul.{2 * head}.second"] == POSITIONS["matmul.0.second"]
        assert per_head[f"mul.{head}"] == POSITIONS["mul.0"]
        assert per_head[f"softmax.{head}"] == POSITIONS["softmax.0"]
        assert per_head[f"matmul.{2 * head + 1}"] == POSITIONS["matmul.1"]
        assert per_head[f"matmul.{2 * head + 1}.second"] == POSITIONS["matmul.1.second"]
    assert per_head["cat.0"] == POSITIONS["matmul.1"]
    activations = result["activation_encodings"]
    assert activations.pop("conv_in") == sections["activation_encodings"]["conv_in"]
    assert activations == {
        f"{parent}_convs.{head}": places for parent, places in projections.items() for head in range(heads)
    }


def test_attention_that_is_more_than_plain_is_refused() -> None:
    state = {f"{LAYERS[0]}.to_q.weight": torch.zeros(4, 2)}
    positions = {**POSITIONS, "add.0": entry(1.0)}
    del positions["mul.0"]
    sections = {"activation_encodings": {}, "functional_encodings": {LAYERS[0]: positions}}
    with pytest.raises(EncodingsError, match=f"attention `{LAYERS[0]}` is not scale, .*: add.0, mul.0"):
        split_activations(sections, splits(state, {LAYERS[0]: 2}))
