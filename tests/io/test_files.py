"""Files that happen whole or not at all, checksums, and JSON that holds infinities."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdconvert.errors import EnvironmentProblem, PreconditionError
from sdconvert.io.files import atomic_file, atomic_folder, read_json, sha256_folder, write_json_atomic

# Text that reads like a number that JSON lacks comes back as that number; no stage writes such text.
TEXT = st.text().filter(lambda text: text not in ("Infinity", "-Infinity", "NaN"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def same(left: Any, right: Any) -> bool:
    return json.dumps(left) == json.dumps(right)


@given(value=JSON)
def test_json_round_trip_includes_what_json_lacks(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("json") / "value.json"
    write_json_atomic(value, path)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert same(read_json(path), value)


def test_unreadable_json_is_named(tmp_path: Path) -> None:
    for content in (None, b'{"a": ', b"\xff"):
        path = tmp_path / "value.json"
        if content:
            path.write_bytes(content)
        with pytest.raises(PreconditionError, match=r"value\.json"):
            read_json(path)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_file_and_folder(tmp_path: Path, error: type[BaseException]) -> None:
    for text in ("old", "new"):
        for opener, name in ((atomic_file, "file.txt"), (atomic_folder, "folder")):
            try:
                with opener(tmp_path / name) as temporary:
                    (temporary / "inside" if temporary.is_dir() else temporary).write_text(text)
                    if text == "new":
                        raise error
            except error:
                pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "folder"]
    assert (tmp_path / "file.txt").read_text() == (tmp_path / "folder/inside").read_text() == "old"


def test_success_replaces_all_that_was_there(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with atomic_folder(tmp_path / "deep/folder") as folder:
            (folder / name).touch()
    assert [path.name for path in (tmp_path / "deep/folder").iterdir()] == ["second"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["folder"]


def test_results_follow_the_umask_not_that_of_temporary_files(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    write_json_atomic({}, tmp_path / "atomic.json")
    with atomic_folder(tmp_path / "folder"):
        pass
    assert (tmp_path / "atomic.json").stat().st_mode == plain.stat().st_mode
    (tmp_path / "made").mkdir()
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "made").stat().st_mode


def test_full_disk_is_an_environment_problem(small_disk: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=str(small_disk)), atomic_folder(small_disk / "folder") as folder:
        (folder / "big").write_bytes(bytes(1 << 20))
    with pytest.raises(EnvironmentProblem, match="no space left"):
        write_json_atomic("x" * (1 << 20), small_disk / "value.json")
    assert list(small_disk.iterdir()) == []


def test_other_system_errors_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file") as caught, atomic_file(tmp_path / "file/below"):
        pass
    assert not isinstance(caught.value, EnvironmentProblem)


def test_folder_hash_sees_names_contents_and_borders(tmp_path: Path) -> None:
    def digest(**files: str) -> str:
        with atomic_folder(tmp_path / "folder") as folder:
            for name, text in files.items():
                (folder / name).write_text(text)
        return sha256_folder(tmp_path / "folder")

    assert digest(a="1", b="2") == digest(b="2", a="1")
    assert len({digest(), digest(a=""), digest(a="1"), digest(b="1"), digest(a="1", b="2"), digest(a="2", b="1")}) == 6
