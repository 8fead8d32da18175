"""The form that the stages exchange: every shape is read, what is written is read back, what is wrong is named."""

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdconvert.errors import EncodingsError
from sdconvert.io.encodings import read_encodings, write_encodings, write_params

ENTRY = {
    "bitwidth": 8,
    "dtype": "int",
    "is_symmetric": "True",
    "max": 0.127,
    "min": -0.128,
    "offset": -128,
    "scale": 0.001,
}
FLOAT = {"bitwidth": 16, "dtype": "float"}
PARAMS = {"conv.weight": [ENTRY, ENTRY], "norm.weight": [FLOAT]}
ACTIVATIONS = {"conv": {"output": {"0": ENTRY}}, "norm": {"input": {"0": ENTRY}, "output": {"0": FLOAT}}}
FUNCTIONAL = {"attn": {"matmul.0": ENTRY, "matmul.0.second": ENTRY}, "": {"sample": ENTRY}}

names = st.text(string.ascii_letters + string.digits + "._", min_size=1, max_size=12)
scales = st.floats(1e-30, 1e30)
bounds = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def tensors(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Encodings of one tensor: floats, or channels on one kind of grid."""
    count = draw(st.integers(1, 4))
    if draw(st.booleans()):
        return [FLOAT] * count
    kind = {"bitwidth": draw(st.sampled_from([4, 8, 16])), "dtype": "int"}
    kind["is_symmetric"] = draw(st.sampled_from(["True", "False"]))
    return [
        {
            **kind,
            "max": draw(bounds),
            "min": draw(bounds),
            "offset": draw(st.integers(-(2**15), 0)),
            "scale": draw(scales),
        }
        for _ in range(count)
    ]


params = st.dictionaries(names, tensors(), min_size=1, max_size=4)


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@given(params)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_parameters_survive_writing(tmp_path: Path, content: dict[str, Any]) -> None:
    write_params(tmp_path / "p.encodings", content)
    assert read_encodings(tmp_path / "p.encodings")["param_encodings"] == content
    write_encodings(tmp_path / "f.encodings", {"param_encodings": content, "functional_encodings": FUNCTIONAL})
    assert read_encodings(tmp_path / "f.encodings") == {
        "param_encodings": content,
        "activation_encodings": {},
        "functional_encodings": FUNCTIONAL,
    }


@pytest.mark.parametrize("shape", ["flat", "adaround", "full", "without_version"])
def test_all_shapes_of_the_file_are_read(tmp_path: Path, shape: str) -> None:
    full = {"version": "0.6.1", "producer": {}, "excluded_layers": [], "activation_encodings": ACTIVATIONS}
    contents: dict[str, dict[str, Any]] = {
        "flat": PARAMS,
        "adaround": {"param_encodings": PARAMS},
        "full": full | {"param_encodings": PARAMS},
        "without_version": {"activation_encodings": ACTIVATIONS, "param_encodings": PARAMS},
    }
    content = contents[shape]
    sections = read_encodings(write(tmp_path / "x.encodings", content))
    assert sections["param_encodings"] == PARAMS
    assert sections["activation_encodings"] == (ACTIVATIONS if "activation_encodings" in content else {})
    assert sections["functional_encodings"] == {}


def test_activations_alone_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.encodings", {"activation_encodings": ACTIVATIONS})
    assert read_encodings(path)["activation_encodings"] == ACTIVATIONS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read"),
        ('{"a": ', "cannot be read"),
        ("[]", "holds no encodings"),
        ("{}", "holds no encodings"),
        ({"version": "1.0.0", "param_encodings": []}, "has encoding version 1.0.0; this reads 0.6.1"),
        ({"version": "2.0.0", "encodings": []}, "has encoding version 2.0.0"),
        ({"param_encodings": [ENTRY]}, "param_encodings is a list"),
        ({"param_encodings": 3}, "param_encodings is a int"),
        ({"conv.weight": ENTRY}, "`conv.weight` is no list of encodings"),
        ({"conv.weight": []}, "`conv.weight` is no list of encodings"),
        ({"conv.weight": [1.0]}, "`conv.weight` holds a float, no encoding"),
        ({"conv.weight": [{"bitwidth": 8}]}, "`conv.weight` lacks dtype"),
        ({"conv.weight": [{**FLOAT, "dtype": "int"}]}, "`conv.weight` lacks is_symmetric, max, min, offset, scale"),
        ({"activation_encodings": [ENTRY]}, "activation_encodings is a list"),
        ({"activation_encodings": {"conv": {"output": {"0": {"dtype": "int", "bitwidth": 8}}}}}, "`conv` lacks is_sy"),
        ({"activation_encodings": {"conv": {"output": 3}}}, "`conv` lacks bitwidth, dtype"),
        ({"param_encodings": PARAMS, "functional_encodings": {"a": {"add.0": {}}}}, "`a` lacks bitwidth, dtype"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path / "x.encodings", content)
    with pytest.raises(EncodingsError, match=message) as error:
        read_encodings(path)
    assert str(path) in str(error.value)
    assert error.value.hint


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EncodingsError, match=r"gone\.encodings` cannot be read"):
        read_encodings(tmp_path / "gone.encodings")


def test_a_version_other_than_ours_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(EncodingsError) as error:
        read_encodings(write(tmp_path / "x.encodings", {"version": "1.0.0", "param_encodings": []}))
    assert "sdconvert encodings convert" in error.value.hint
