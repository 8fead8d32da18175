"""Cutting encodings as weights are cut: every version and granularity, there, compared, and back."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdconvert.errors import EncodingsError, QualityGateError
from sdconvert.io.encodings import EncodingsFile, TensorEncoding, parse_encodings
from sdconvert.io.encodings.convert import convert
from sdconvert.io.encodings.grid import grid_of
from sdconvert.mha2sha.encodings import (
    merge_encodings,
    split_encodings,
    verify_dequantized_weights,
    verify_parameter_encodings,
)
from sdconvert.mha2sha.heads import head_splits
from sdconvert.mha2sha.row_split import RowSplit, even_split

ATTN = "mid_block.attn1"
SUFFIX = "_7"


@dataclass(frozen=True)
class Conversion:
    """A file of some version, and how the weights of its model are cut."""

    content: dict[str, Any]
    version: str
    shapes: dict[str, tuple[int, ...]]
    splits: list[RowSplit]

    def file(self) -> EncodingsFile:
        file = parse_encodings(json.dumps(self.content))
        return file if self.version == file.version else convert(file, self.version, self.shapes).file


def rewritten(shapes: dict[str, tuple[int, ...]], heads: int) -> list[RowSplit]:
    """Heads, a feed-forward's two halves, and a projection that becomes a convolution under its name."""
    gate, out = "ff.net.0.proj.weight", f"{ATTN}.to_out.0.weight"
    halves = [f"ff.net.0.proj_convs.{half}.weight" for half in (0, 1)]
    return [
        *head_splits(shapes, {ATTN: heads}),
        even_split(f"{ATTN}.to_out.0", out, [out], shapes[out][0], to_convolution=True),
        even_split("ff.net.0", gate, halves, shapes[gate][0], to_convolution=True),
        even_split("rows", "rows.weight", ["rows.0.weight", "rows.1.weight"], shapes["rows.weight"][0], False),
    ]


@st.composite
def conversions(draw: st.DrawFn) -> Conversion:
    """Attention with its projections apart or fused, and the other rewrites, each parameter of a kind of its own."""
    heads, dim, kv_heads = draw(st.sampled_from([(1, 3, 1), (2, 1, 2), (2, 3, 1), (4, 2, 2), (3, 2, 3)]))
    fused = kv_heads == heads and draw(st.booleans())
    blocks, size = draw(st.integers(2, 3)), draw(st.sampled_from([1, 2]))
    columns = blocks * size
    rows = (
        {"to_qkv": 3 * heads * dim} if fused else {"to_q": heads * dim, "to_k": kv_heads * dim, "to_v": kv_heads * dim}
    )
    shapes: dict[str, tuple[int, ...]] = {"conv_in.weight": (3, columns, 1, 1)}
    shapes |= {f"{ATTN}.{name}.weight": (count, columns) for name, count in rows.items()}
    shapes |= {
        f"{ATTN}.to_out.0.weight": (5, columns),
        "ff.net.0.proj.weight": (4, columns),
        "rows.weight": (4, columns),
    }
    version = draw(st.sampled_from(["0.6.1", "1.0.0", "2.0.0"]))
    biased = draw(st.booleans())
    if biased:
        shapes |= {f"{ATTN}.{name}.bias": (count,) for name, count in rows.items()}
    kinds = ["tensor", "channel", "block"] + {"0.6.1": ["float"], "1.0.0": ["float", "lpbq"], "2.0.0": ["lpbq"]}[
        version
    ]
    params = []
    for key, shape in shapes.items():
        kind = draw(st.sampled_from(kinds if len(shape) > 1 else ["channel"]))
        constant = len(shape) == 2 and draw(st.booleans())
        params.append(entry(draw, f"{key}{SUFFIX}" if constant else key, kind, shape[0], blocks, size))
    order = draw(st.permutations(params))
    content = {"version": "1.0.0", "activation_encodings": [], "param_encodings": order}
    return Conversion(content, version, shapes, rewritten(shapes, heads))


def entry(draw: st.DrawFn, name: str, kind: str, rows: int, blocks: int, size: int) -> dict[str, Any]:
    if kind == "float":
        return {"name": name, "enc_type": "PER_TENSOR", "dtype": "FLOAT", "bw": 16}
    count = {"tensor": 1, "block": rows * blocks}.get(kind, rows)
    symmetric = kind == "lpbq" or draw(st.booleans())
    enc_type = {"tensor": "PER_TENSOR", "channel": "PER_CHANNEL", "block": "PER_BLOCK", "lpbq": "LPBQ"}[kind]
    head = {"name": name, "enc_type": enc_type, "dtype": "INT", "bw": 8, "is_sym": symmetric}
    # Every scale is another: a row at a wrong place shows.
    head["scale"] = [0.001 * (1 + index) + 1e-5 * draw(st.integers(0, 9)) for index in range(count)]
    head["offset"] = [-128 if symmetric else -draw(st.integers(0, 255)) for _ in range(count)]
    if kind in ("block", "lpbq"):
        head["block_size"] = size
    if kind == "lpbq":
        head |= {"compressed_bw": 4, "per_block_int_scale": [1 + index % 16 for index in range(rows * blocks)]}
    return head


def assert_rows_are_kept(conversion: Conversion) -> None:
    """Compare dequantized weights: those of a part are the rows of its parent's, bit by bit."""
    file = conversion.file()
    result = split_encodings(file, conversion.splits, list(conversion.shapes)).file
    names = {name.removesuffix(SUFFIX): (name, encoding) for name, encoding in file.every_tensor()}
    parts = dict(result.every_tensor())
    rng = np.random.default_rng(0)
    for split in conversion.splits:
        name, whole = names[split.parent]
        rows, columns = split.rows, conversion.shapes[split.parent][-1] if "weight" in name else 1
        weight = rng.normal(size=(rows, columns)).astype(np.float32)
        constant = name != split.parent
        expected = grid_of(name, whole, rows, transposed=constant).dequantized(weight)
        for part in split:
            child = part.name if split.to_convolution or not constant else part.name + SUFFIX
            stays = constant and not split.to_convolution
            grid = grid_of(child, parts[child], part.stop - part.start, transposed=stays)
            assert np.array_equal(grid.dequantized(weight[part.rows]), expected[part.rows]), child
            if split.to_convolution and "axis" in parts[child].fields:
                assert parts[child].fields["axis"] == (1 if "block_size" in parts[child].fields else 0)
    compared = verify_parameter_encodings(file, result, conversion.splits)
    assert compared == sum(len(split.parts) for split in conversion.splits)


def assert_reverse_is_the_original(conversion: Conversion) -> None:
    file = conversion.file()
    result = split_encodings(file, conversion.splits, list(conversion.shapes))
    record = json.loads(json.dumps(result.record))
    assert not result.left_out
    assert merge_encodings(parse_encodings(result.file.dumps()), conversion.splits, record).dumps() == file.dumps()


@given(conversions())
@settings(max_examples=60, deadline=None)
def test_parts_are_rows_and_together_the_parent(conversion: Conversion) -> None:
    assert_rows_are_kept(conversion)
    assert_reverse_is_the_original(conversion)


@pytest.mark.slow
@given(conversions())
@settings(max_examples=2500, deadline=None)
def test_parts_are_rows_and_together_the_parent_in_very_many_cases(conversion: Conversion) -> None:
    assert_rows_are_kept(conversion)
    assert_reverse_is_the_original(conversion)


@given(conversions(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_grid_that_is_not_the_parent_s_is_found(conversion: Conversion, data: st.DataObject) -> None:
    file = conversion.file()
    result = split_encodings(file, conversion.splits, list(conversion.shapes)).file
    (section,) = [name for name, entries in result.tensors.items() if entries]
    children = {part.name for split in conversion.splits for part in split}
    grids = [name for name in result.tensors[section] if name.removesuffix(SUFFIX) in children]
    name = data.draw(st.sampled_from(grids))
    encoding = result.tensors[section][name]
    changed = {section: result.tensors[section] | {name: damaged(encoding)}}
    with pytest.raises(QualityGateError, match=name):
        verify_parameter_encodings(file, replace(result, tensors=changed), conversion.splits)
    missing = {section: {key: value for key, value in result.tensors[section].items() if key != name}}
    with pytest.raises(QualityGateError, match=name):
        verify_parameter_encodings(file, replace(result, tensors=missing), conversion.splits)


def damaged(encoding: TensorEncoding) -> TensorEncoding:
    """The same with its last scale, or its bits, another."""
    arrays = encoding.arrays()
    if not arrays:
        field = next(name for name in ("bitwidth", "bw", "y_scale") if name in encoding.fields)
        return encoding.with_fields({field: 2 * encoding.fields[field]}, encoding.count)
    field = next(name for name in ("scale", "y_scale", "per_channel_float_scale") if name in arrays)
    values = json.loads(json.dumps(arrays[field]))
    inner = values
    while isinstance(inner[-1], list):
        inner = inner[-1]
    inner[-1] *= 1.5
    return encoding.with_fields({field: values}, encoding.count)


@given(conversions(), st.data())
@settings(max_examples=40, deadline=None)
def test_dequantized_weights_are_compared_by_value(conversion: Conversion, data: st.DataObject) -> None:
    file = conversion.file()
    result = split_encodings(file, conversion.splits, list(conversion.shapes)).file
    rng = np.random.default_rng(1)
    mha = {key: rng.normal(size=shape).astype(np.float32) for key, shape in conversion.shapes.items()}
    sha = {part.name: mha[split.parent][part.rows].copy() for split in conversion.splits for part in split}
    readers = [lambda key, start, stop, state=state: state[key][start:stop] for state in (mha, sha)]
    compared = verify_dequantized_weights(file, result, conversion.splits, *readers, sample=1000)
    assert compared == sum(mha[split.parent].size for split in conversion.splits if split.parent.endswith("weight"))
    split = data.draw(st.sampled_from([one for one in conversion.splits if one.parent.endswith("weight")]))
    part = data.draw(st.sampled_from(split.parts))
    # A weight that is swapped for its negative is another value on every grid that has both, and on floats.
    sha[part.name][-1] = np.where(mha[split.parent][part.stop - 1] > 0, -1e3, 1e3)
    with pytest.raises(QualityGateError, match="dequantizes to other values"):
        verify_dequantized_weights(file, result, conversion.splits, *readers, sample=1000)


SHAPES = {f"{layer}.to_{name}.weight": (4, 2) for layer in ("a", "b") for name in "qkv"} | {"conv.weight": (3, 2)}
SPLITS = head_splits(SHAPES, {"a": 2, "b": 2})
FLOAT = [{"bitwidth": 16, "dtype": "float"}]
INT = [
    {"bitwidth": 8, "dtype": "int", "is_symmetric": "True", "max": 1.27, "min": -1.28, "offset": -128, "scale": 0.01}
]


def flat(**entries: Any) -> dict[str, Any]:
    return dict.fromkeys(SHAPES, INT) | {key.replace("__", "."): value for key, value in entries.items()}


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in flat().items() if key not in keys}


def typed(*names: str) -> dict[str, Any]:
    return {"version": "2.0.0", "encodings": [{"name": n, "output_dtype": "int8", "y_scale": 0.1} for n in names]}


VECTOR = {"vector_dim": 2, "rows_per_block": 1, "cols_per_block": 1, "vector_stride": 1, "index_bw": 4}


def test_the_half_of_an_autoencoder_that_is_no_part_of_the_graph_has_no_encodings() -> None:
    shapes = {f"{half}.mid.to_{name}.weight": (4, 2) for half in ("encoder", "decoder") for name in "qkv"}
    splits = head_splits(shapes, {"encoder.mid": 1, "decoder.mid": 1})
    content = {f"decoder.mid.to_{name}.weight": INT for name in "qkv"}
    split = split_encodings(parse_encodings(json.dumps(content)), splits, list(shapes))
    assert list(split.file.params) == [f"decoder.mid.to_{name}_convs.0.weight" for name in "qkv"]
    # Of a half that has some, it must have all.
    content["encoder.mid.to_q.weight"] = INT
    with pytest.raises(EncodingsError, match=r"none for `encoder\.mid\.to_k\.weight` \(2 are missing\)"):
        split_encodings(parse_encodings(json.dumps(content)), splits, list(shapes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            flat(a__to_q__weight=INT * 3),
            r"`a\.to_q\.weight` has 3 encodings: neither 1 \(per tensor\) nor 4 \(per row\)",
        ),
        (flat(a__to_q__weight=[INT[0] | VECTOR]), r"`a\.to_q\.weight` is quantized as VECTOR"),
        (flat(a__to_z__weight=INT), r"1 encodings are for no parameter of the weights, the first `a\.to_z\.weight`"),
        (
            without("a.to_k.weight"),
            r"encodings for `a\.to_q\.weight`, and none for `a\.to_k\.weight` \(1 are missing\)",
        ),
        (
            without("b.to_q.weight", "b.to_k.weight", "b.to_v.weight"),
            r"and none for `b\.to_q\.weight` \(3 are missing\)",
        ),
        (typed("a.to_q.weight", "a.to_k.weight"), r"and none for `a\.to_v\.weight`"),
        (typed("a.to_q.weight", "a.to_z.weight_0"), r"no parameter of the weights, the first `a\.to_z\.weight_0`"),
        ({"a.to_q_convs.0.weight": INT}, r"in SHA form already: `a\.to_q_convs\.0\.weight` and 0 more"),
        (
            {"activation_encodings": {"a.to_k_convs.1": {"output": {"0": INT[0]}}}},
            r"SHA form already: `a\.to_k_convs\.1`",
        ),
        ({"activation_encodings": {"/a/to_k_convs.1/Conv_output_0": INT}}, r"SHA form already: `/a/to_k_convs\.1/Conv"),
    ],
)
def test_what_does_not_fit_is_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(EncodingsError, match=message) as error:
        split_encodings(parse_encodings(json.dumps(content)), SPLITS, list(SHAPES))
    assert error.value.hint


@pytest.mark.parametrize(
    "content",
    [
        {"param_encodings": without("a.to_k.weight"), "excluded_layers": ["a.to_k"]},
        {"conv.weight": INT},
        typed("a.to_q.weight", "a.to_k.weight", "a.to_v.weight"),
        flat(a__to_q__weight=FLOAT),
    ],
)
def test_what_is_meant_to_be_missing_is_no_error(content: dict[str, Any]) -> None:
    file = parse_encodings(json.dumps(content))
    result = split_encodings(file, SPLITS, list(SHAPES))
    assert merge_encodings(result.file, SPLITS, result.record) == file


def test_nearest_names_are_hinted_at() -> None:
    with pytest.raises(EncodingsError) as error:
        split_encodings(parse_encodings(json.dumps(flat(conv__weigt=INT))), SPLITS, list(SHAPES))
    assert error.value.hint == "nearest parameter: `conv.weight`"


def parts_of(keys: Sequence[str]) -> dict[str, Any]:
    return {part.name: INT for split in SPLITS if split.parent in keys for part in split}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop("a.to_q_convs.1.weight"), r"`a\.to_q_convs\.1\.weight` and 0 more parts of `a\.to_q"),
        (
            lambda parts: parts.update({"a.to_q_convs.1.weight": FLOAT}),
            "parts of `a.to_q.weight` had one scale, and now",
        ),
    ],
)
def test_parts_that_are_no_whole_are_refused(change: Any, message: str) -> None:
    result = split_encodings(parse_encodings(json.dumps(flat())), SPLITS, list(SHAPES))
    parts = json.loads(result.file.dumps())
    change(parts)
    with pytest.raises(EncodingsError, match=message):
        merge_encodings(parse_encodings(json.dumps(parts)), SPLITS, result.record)
