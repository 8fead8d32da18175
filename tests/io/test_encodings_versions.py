"""Every version and form of an encodings file: what AIMET writes is read and written back; what is wrong is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from encodings_cases import aimet_file, files_of_aimet, kind_of, same_json
from hypothesis import given, settings
from hypothesis import strategies as st

from sdconvert.errors import EncodingsError
from sdconvert.io.encodings import Kind, describe, parse_encodings, read_encodings_file

pytestmark = pytest.mark.filterwarnings("ignore")

LEGACY_ENTRY = {"bitwidth": 8, "dtype": "int", "is_symmetric": "True", "max": 1.27, "min": -1.28, "offset": -128}
CHANNEL = {
    "enc_type": "PER_CHANNEL",
    "dtype": "INT",
    "bw": 8,
    "is_sym": True,
    "scale": [0.1, 0.2],
    "offset": [-128] * 2,
}
TYPED = {"output_dtype": "int8", "y_scale": [0.1, 0.2], "axis": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("aimet")


@pytest.mark.parametrize(("granularity", "exporter", "version"), files_of_aimet())
def test_what_aimet_writes_is_written_back(
    folder: Path, tmp_path: Path, granularity: str, exporter: str, version: str
) -> None:
    path = aimet_file(granularity, exporter, version, folder)
    file = read_encodings_file(path)
    file.write(tmp_path / "again.encodings")
    assert same_json(path.read_text(), (tmp_path / "again.encodings").read_text())
    assert parse_encodings(file.dumps()) == file
    # What AIMET calls 1.0.0 in `*_torch.encodings` has the form of 0.6.1.
    assert json.loads(path.read_text())["version"] == version
    assert file.version == ("0.6.1" if exporter == "torch" else version)
    weight = file.mixed.get("lin.weight_0") or file.params.get("lin.weight") or file.params.get("lin.weight_0")
    assert (weight and weight.kind) == kind_of(granularity, exporter, version)


@pytest.mark.parametrize(
    ("granularity", "exporter", "section", "grids"),
    [
        ("float", "torch", "param_encodings", {"int8 channel": 2, "float16": 1}),
        ("lpbq", "export", "param_encodings", {"int4 lpbq": 3}),
    ],
)
def test_a_file_is_described_in_numbers(
    folder: Path, granularity: str, exporter: str, section: str, grids: dict[str, int]
) -> None:
    described = describe(read_encodings_file(aimet_file(granularity, exporter, "1.0.0", folder)))
    assert described["activations_by"] == ("module" if exporter == "torch" else "tensor")
    assert described["sections"][section]["grids"] == grids


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()
)
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
sections = st.sampled_from(["version", "param_encodings", "activation_encodings", "functional_encodings", "encodings"])


@given(st.dictionaries(st.one_of(sections, st.text(max_size=5)), values, max_size=4) | values)
@settings(max_examples=100, deadline=None)
def test_any_json_is_read_or_refused(content: Any) -> None:
    try:
        file = parse_encodings(json.dumps(content))
    except EncodingsError:
        return
    assert same_json(file.dumps(), json.dumps(content))


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    with pytest.raises((EncodingsError, ValueError)):
        parse_encodings(text + "}")


def legacy(**changes: Any) -> dict[str, Any]:
    return {"w": [{**LEGACY_ENTRY, "scale": 0.01, **changes}]}


def lists(**changes: Any) -> dict[str, Any]:
    return {"version": "1.0.0", "param_encodings": [{"name": "w", **CHANNEL, **changes}]}


def typed(**changes: Any) -> dict[str, Any]:
    entry = {"name": "w", **TYPED, **changes}
    return {"version": "2.0.0", "encodings": [{key: value for key, value in entry.items() if value is not None}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (legacy(scale=0.0), "`w` has the scale 0.0"),
        (legacy(scale=-1.0), "`w` has the scale -1.0"),
        (legacy(scale="1"), "`w` has the scale '1'"),
        (legacy(scale=True), "`w` has the scale True"),
        (legacy(scale=10**400), "`w` has the scale 1000"),
        (legacy(min="low"), "`w` has the min 'low'"),
        (legacy(offset=0.5), "`w` has an offset that is no whole number"),
        (legacy(is_symmetric=True), "`w` has the is_symmetric True"),
        (legacy(bitwidth=0), "`w` has 0 bits"),
        (legacy(bitwidth=8.0), "`w` has the bitwidth 8.0"),
        (legacy(dtype="INT"), "`w` has the dtype 'INT'"),
        ({"w": [{**LEGACY_ENTRY, "scale": 1.0}, {**LEGACY_ENTRY, "scale": 1.0, "bitwidth": 4}]}, "different bitwidth"),
        ({"w": [{**LEGACY_ENTRY, "scale": 1.0}, {"dtype": "int", "bitwidth": 4}]}, "`w` have different fields"),
        (lists(scale=[0.1, 0.0]), "`w` has the scale 0.0"),
        (lists(scale=[0.1]), "`w` has 1 of scale, 2 of offset"),
        (lists(scale=0.1), "per channel, and its scale is one number"),
        (lists(enc_type="PER_ROW"), "`w` has the enc_type 'PER_ROW'"),
        (lists(enc_type="PER_TENSOR"), "1 of PER_TENSOR"),
        (lists(enc_type="LPBQ"), "`w` lacks block_size, compressed_bw, per_block_int_scale"),
        (lists(enc_type="PER_BLOCK"), "`w` lacks block_size"),
        (lists(is_sym="True"), "`w` has the is_sym 'True'"),
        ({"version": "1.0.0", "param_encodings": [{**CHANNEL}]}, "an entry has no name"),
        ({"version": "1.0.0", "param_encodings": [{"name": "w", **CHANNEL}] * 2}, "`w` is there twice"),
        ({"version": "1.0.0", "encodings": []}, "encodings is a list, and the version 1.0.0"),
        ({"version": "2.0.0", "param_encodings": {}}, "param_encodings is an object, and the version 2.0.0"),
        ({"version": "0.6.1", "param_encodings": [LEGACY_ENTRY]}, "param_encodings is a list, and the version 0.6.1"),
        ({"version": "3.0.0", "encodings": []}, "encoding version 3.0.0"),
        (typed(y_scale=[0.1, -0.2]), "`w` has the y_scale -0.2"),
        (typed(y_scale=None), "`w` lacks y_scale"),
        (typed(y_zero_point=[1]), "`w` has 2 of y_scale, 1 of y_zero_point"),
        (typed(output_dtype="byte"), "`w` has the output_dtype 'byte'"),
        (typed(block_size=4), "per block, and its y_scale is a list"),
        (typed(y_scale={"x": [[1]], "x_scale": [0.1]}), "`w` lacks block_size"),
        (typed(y_scale={"x": [1], "x_scale": [0.1]}, block_size=4), "its y_scale.x is a list"),
        (typed(axis="0"), "`w` has the axis '0'"),
        (typed(y_scale=0.1), "per channel, and its y_scale is one number"),
        (typed(axis=None), "per tensor, and its y_scale is a list"),
        ({"activation_encodings": {"a": [{**LEGACY_ENTRY, "scale": 1.0}], "b": {"output": {}}}}, "keyed by module"),
        ({"w": [{**LEGACY_ENTRY, "scale": 1.0}], "version": "0.6.1"}, "`version` stands among parameters"),
    ],
)
def test_what_is_no_grid_is_refused(content: Any, message: str) -> None:
    with pytest.raises(EncodingsError, match=message) as error:
        parse_encodings(json.dumps(content))
    assert error.value.hint


@pytest.mark.parametrize(
    "text",
    [
        '{"param_encodings": {"w": [{"bitwidth": 8, "dtype": "int", "scale": NaN}]}}',
        '{"w": [{"bitwidth": 16, "dtype": "float"}], "w": [{"bitwidth": 16, "dtype": "float"}]}',
        '{"w": [{"bitwidth": 16, "dtype": "float"}]} {}',
        '{"w" [}',
        "[" * 100_000,
        '{"param_encodings": {"w": ' + "[" * 100_000,
        '{"w": [{"bitwidth": ' + "9" * 5000 + "}]}",
    ],
)
def test_hostile_text_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.encodings"
    path.write_text(text)
    with pytest.raises(EncodingsError, match=r"x\.encodings"):
        read_encodings_file(path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.encodings").write_bytes(b"\xff\xfe{}")
    with pytest.raises(EncodingsError, match="cannot be read"):
        read_encodings_file(tmp_path / "x.encodings")


def test_a_vector_quantized_tensor_is_kept() -> None:
    fields = {"rows_per_block": 1, "cols_per_block": 2, "vector_dim": 2, "vector_stride": 1, "index_bw": 4}
    content = lists(enc_type="VECTOR", **fields)
    file = parse_encodings(json.dumps(content))
    assert file.params["w"].kind is Kind.OPAQUE
    assert same_json(file.dumps(), json.dumps(content))
