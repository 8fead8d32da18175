"""`heads.json` comes back as it was saved, and what is no name map is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdconvert.errors import CheckpointError
from sdconvert.mha2sha.name_map import NAME, NameMap
from sdconvert.mha2sha.row_split import even_split

names = st.text(min_size=1, max_size=8)
splits = st.builds(
    lambda layer, parent, children, rows, conv: even_split(layer, parent, children, rows * len(children), conv),
    names,
    names,
    st.lists(names, min_size=1, max_size=4, unique=True),
    st.integers(1, 9),
    st.booleans(),
)


@settings(max_examples=30)
@given(st.lists(splits, max_size=4), st.dictionaries(names, st.integers(1, 9)), st.dictionaries(names, names))
def test_a_name_map_comes_back(tmp_path_factory: pytest.TempPathFactory, rows, heads, left_alone) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("map")
    saved = NameMap(tuple(rows), heads, left_alone, {"files": []}, {"unet.encodings": {"order": [1, 2]}})
    saved.save(folder)
    assert NameMap.load(folder) == saved


CONTENT = {
    "version": 1,
    "heads": {},
    "left_alone": {},
    "weights": {},
    "encodings": {},
    "rewrites": [],
    "folded": {},
    "splits": [{"layer": "a", "parent": "a.to_q.weight", "to_convolution": True, "parts": [["x", 0, 2], ["y", 2, 4]]}],
}


def with_parts(*parts: list[object]) -> dict[str, object]:
    return CONTENT | {"splits": [{**CONTENT["splits"][0], "parts": list(parts)}]}  # type: ignore[dict-item, index]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no name map"),
        ("[]", "is no name map"),
        ("[" * 100_000, "is no name map"),
        ({}, "is no name map: KeyError"),
        (CONTENT | {"version": 2}, "has version 2, not 1"),
        (CONTENT | {"splits": [{}]}, "is no name map: KeyError"),
        (CONTENT | {"encodings": {"../unet.encodings": {}}}, "is no name of a file in the folder"),
        (with_parts(), "the parts of `a.to_q.weight` do not cover it"),
        (with_parts(["x", 0, 2], ["y", 3, 4]), "do not cover it"),
        (with_parts(["x", 1, 2]), "do not cover it"),
        (with_parts(["x", 0, 0]), "do not cover it"),
        (with_parts(["x", 0]), "is no name map"),
    ],
)
def test_what_is_no_name_map_is_refused(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / NAME).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CheckpointError, match=message) as error:
        NameMap.load(tmp_path)
    assert "sdconvert mha2sha" in error.value.hint


def test_a_folder_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"heads.json` is no name map: FileNotFoundError"):
        NameMap.load(tmp_path)
