"""Between versions: AIMET's own file of the other version, grids to the last bit, and clear words where not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encodings_cases import GRANULARITIES, SHAPES, Model, aimet_file, models
from hypothesis import given, settings
from hypothesis import strategies as st

from sdconvert.errors import EncodingsError, SdconvertError, UsageError
from sdconvert.io.encodings import EncodingsFile, parse_encodings, read_encodings_file
from sdconvert.io.encodings.convert import convert
from sdconvert.io.encodings.grid import grid_of

pytestmark = pytest.mark.filterwarnings("ignore")
LPBQ = "LPBQ, whose scales of blocks are products"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("aimet")


def pairs() -> list[Any]:
    """Files of one simulation in two versions; all that the slow exporter writes only in slow tests."""
    found = [pytest.param("export", "0.6.1", "1.0.0", granularity) for granularity in GRANULARITIES]
    for first, second in (("1.0.0", "2.0.0"), ("0.6.1", "2.0.0"), ("0.6.1", "1.0.0"), ("2.1.0", "2.0.0")):
        for granularity in GRANULARITIES:
            fast = (first, granularity) in (("1.0.0", "block"), ("1.0.0", "lpbq"))
            marks = [] if fast else [pytest.mark.slow]
            found.append(pytest.param("onnx", first, second, granularity, marks=marks))
    return found


@pytest.mark.parametrize(("exporter", "first", "second", "granularity"), pairs())
def test_the_result_is_aimet_s_own_file_of_that_version(
    folder: Path, exporter: str, first: str, second: str, granularity: str
) -> None:
    files = [read_encodings_file(aimet_file(granularity, exporter, version, folder)) for version in (first, second)]
    compared = 0
    for file, other in (files, files[::-1]):
        if granularity == "lpbq" and "0.6.1" in (first, second):
            continue  # AIMET writes its products there, and no other version says those
        if other.version == "2.1.0":
            continue  # which is read only
        result = convert(file, other.version, SHAPES)
        ours, theirs = (dict(one.every_tensor()) for one in (result.file, other))
        for name in ours.keys() & theirs.keys():
            # What the slow exporter calls `quantize_dequantize_8` depends on the number of int32 biases.
            assert ours[name].fields == theirs[name].fields, name
            compared += name in theirs
    assert compared >= 10 or granularity == "lpbq"


def as_dicts(file: EncodingsFile) -> dict[str, Any]:
    return {name: encoding.fields for name, encoding in file.every_tensor()}


def assert_round_trip(model: Model, version: str) -> None:
    file = parse_encodings(json.dumps(model.content))
    there = convert(file, version, model.shapes)
    assert not there.lost
    back = convert(parse_encodings(there.file.dumps()), "1.0.0", model.shapes)
    assert as_dicts(back.file) == as_dicts(file)
    assert list(back.file.params) == list(file.params)
    assert back.file.header == file.header


def assert_grids_are_kept(model: Model, version: str) -> None:
    file = parse_encodings(json.dumps(model.content))
    there = dict(convert(file, version, model.shapes).file.every_tensor())
    for name, encoding in file.every_tensor():
        key = name if name in model.shapes else name.rpartition("_")[0]
        rows, constant = model.shapes.get(key, (1,))[0], key != name and name in file.params
        first = grid_of(name, encoding, rows, transposed=constant)
        second = grid_of(name, there[name], rows, transposed=constant)
        assert np.array_equal(first.scale, second.scale)
        assert np.array_equal(first.offset, second.offset)
        assert (first.bitwidth, first.symmetric, first.shift) == (second.bitwidth, second.symmetric, second.shift)


CYCLES = st.one_of(
    st.tuples(models(("tensor", "channel", "block", "float")), st.just("0.6.1")),
    st.tuples(models(("tensor", "channel", "block", "lpbq")), st.just("2.0.0")),
)


@given(CYCLES)
@settings(max_examples=60, deadline=None)
def test_there_and_back_is_the_same(cycle: tuple[Model, str]) -> None:
    assert_round_trip(*cycle)
    assert_grids_are_kept(*cycle)


@pytest.mark.slow
@given(CYCLES)
@settings(max_examples=2500, deadline=None)
def test_there_and_back_is_the_same_in_very_many_cases(cycle: tuple[Model, str]) -> None:
    assert_round_trip(*cycle)
    assert_grids_are_kept(*cycle)


def lists(**changes: Any) -> dict[str, Any]:
    entry = {"name": "w.weight", "enc_type": "PER_CHANNEL", "dtype": "INT", "bw": 8, "is_sym": True}
    entry |= {"scale": [0.5, 0.25], "offset": [-128, -128], **changes}
    return {"version": "1.0.0", "activation_encodings": [], "param_encodings": [entry]}


def legacy(**changes: Any) -> dict[str, Any]:
    entry = {"bitwidth": 8, "dtype": "int", "is_symmetric": "True", "max": 63.5, "min": -64.0, "offset": -128}
    return {"w.weight": [{**entry, "scale": 0.5, **changes}]}


MODULES = {"activation_encodings": {"conv": {"output": {"0": legacy()["w.weight"][0]}}}, "param_encodings": {}}
BLOCKS = {"enc_type": "LPBQ", "block_size": 2, "compressed_bw": 4, "per_block_int_scale": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("content", "version", "shape", "error", "message"),
    [
        (lists(), "1.0.0", None, UsageError, "has form 1.0.0 already"),
        (lists(), "2.1.0", None, UsageError, "no version is called 2.1.0"),
        (lists(), "2.0.0", None, UsageError, "`w.weight` has several scales, and form 1.0.0 does not say along what"),
        (lists(), "2.0.0", (3, 4), EncodingsError, "do not fit 3 rows"),
        (lists(**BLOCKS), "0.6.1", None, EncodingsError, LPBQ),
        (lists(**BLOCKS), "2.0.0", (2, 6), EncodingsError, "2 blocks per row, which do not fit its shape"),
        (lists(**BLOCKS, bw=6, offset=[-32, -32]), "2.0.0", (2, 4), EncodingsError, "LPBQ from 6 to 4 bits"),
        (lists(offset=[-127, -127]), "2.0.0", (2, 4), EncodingsError, "symmetric grid with an offset other than -128"),
        (lists(is_sym=False, offset=[1, 1]), "2.0.0", (2, 4), EncodingsError, "a zero point outside of its type"),
        (lists(enc_type="VECTOR"), "0.6.1", None, EncodingsError, "is quantized as VECTOR"),
        (lists(dtype="FLOAT", enc_type="PER_TENSOR", bw=8), "2.0.0", None, EncodingsError, "a float of 8 bits"),
        (lists(scale=[1e308, 1e308]), "0.6.1", None, EncodingsError, "a range that is no finite number"),
        (legacy(max=63.0, min=-63.0), "1.0.0", None, EncodingsError, "has a min that its scale and offset do not give"),
        ({"w.weight": legacy()["w.weight"] * 2}, "1.0.0", None, UsageError, "has several scales"),
        ({"w.weight": legacy()["w.weight"] * 2}, "1.0.0", (3, 4), EncodingsError, "do not fit 3 rows"),
        ({"v.weight": legacy()["w.weight"] * 2}, "1.0.0", (2, 4), EncodingsError, "`v.weight` is no parameter"),
        (MODULES, "1.0.0", None, EncodingsError, "keyed by module"),
    ],
)
def test_what_a_version_cannot_say_is_refused(
    content: Any, version: str, shape: tuple[int, ...] | None, error: type[SdconvertError], message: str
) -> None:
    shapes = None if shape is None else {"w.weight": shape}
    with pytest.raises(error, match=message) as caught:
        convert(parse_encodings(json.dumps(content)), version, shapes)
    assert caught.value.hint


def test_what_form_2_has_no_place_for_is_listed() -> None:
    half = {"name": "/a/Add_output_0", "enc_type": "PER_TENSOR", "dtype": "FLOAT", "bw": 16}
    content = lists() | {"activation_encodings": [half], "quantizer_args": {"param_bitwidth": 8}, "excluded_layers": []}
    result = convert(parse_encodings(json.dumps(content)), "2.0.0", {"w.weight": (2, 4)})
    assert set(result.lost) == {"/a/Add_output_0", "quantizer_args"}
    assert list(result.file.mixed) == ["w.weight"]
    assert list(json.loads(result.file.dumps())) == ["version", "encodings"]
