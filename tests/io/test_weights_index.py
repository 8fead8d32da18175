"""Where tensors lie is what the libraries say; what is written is what they read; damage is named, never passed on."""

import errno
import json
import mmap
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from stored_weights import LEGACY_DTYPES, bits, random_bits, same, save_sharded, state_dicts, stored_bits
from torch import Tensor

from sdconvert.errors import CheckpointError, EnvironmentProblem, UsageError
from sdconvert.io.stored_tensor import ByteRange, Piece, contiguous, whole
from sdconvert.io.tensors import save_tensors
from sdconvert.io.weights_index import OutputFile, WeightsIndex, WeightsLayout, read_index, write_weights

Folders = pytest.TempPathFactory


def save(state: dict[str, Tensor], path: Path, *, legacy: bool = False) -> Path:
    """Save as the libraries do; in `.pth`, what is shared stays shared."""
    if path.suffix == ".safetensors":
        save_tensors(state, path, {"format": "pt", "é": "kept"})
    else:
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    return path


def rewrite(index: WeightsIndex, path: Path) -> Path:
    pieces = [whole(tensor) for tensor in index.tensors.values()]
    return write_weights(path.parent, [OutputFile(path.name, pieces, index.files[0].metadata)])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@settings(max_examples=60, deadline=None)
@given(state=state_dicts())
def test_tensors_lie_where_the_libraries_find_them(tmp_path_factory: Folders, suffix: str, state: Any) -> None:
    index = read_index(save(state, tmp_path_factory.mktemp("w") / f"w{suffix}"))
    assert index.shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert index.tensors.keys() == state.keys()
    for name, tensor in index.tensors.items():
        assert getattr(torch, tensor.dtype) == state[name].dtype
        assert stored_bits(tensor) == bits(state[name])


@settings(max_examples=40, deadline=None)
@given(state=state_dicts(LEGACY_DTYPES))
def test_files_from_before_torch_1_6_are_read_in_place(tmp_path_factory: Folders, state: Any) -> None:
    index = read_index(save(state, tmp_path_factory.mktemp("w") / "w.bin", legacy=True))
    assert {name: stored_bits(tensor) for name, tensor in index.tensors.items()} == {
        name: bits(tensor) for name, tensor in state.items()
    }


@pytest.mark.parametrize("source", [".safetensors", ".pth"])
@pytest.mark.parametrize("target", [".safetensors", ".pth"])
@settings(max_examples=60, deadline=None)
@given(state=state_dicts())
def test_what_is_written_is_what_the_libraries_read(
    tmp_path_factory: Folders, source: str, target: str, state: Any
) -> None:
    folder = tmp_path_factory.mktemp("w")
    index = read_index(save(state, folder / f"w{source}"))
    written = rewrite(index, folder / f"new{target}")
    if target == ".safetensors":
        readings = [load_file(written)]
        assert read_index(written).files[0].metadata == index.files[0].metadata
    else:
        # Nothing to map is an error of torch's own.
        readings = [torch.load(written, weights_only=True, mmap=mapped) for mapped in (False, True)]
        assert list(readings[0]) == list(index.tensors)
        with zipfile.ZipFile(written) as archive:
            assert archive.testzip() is None
        assert {tensor.storage.start % 64 for tensor in read_index(written).tensors.values()} <= {0}
    for loaded in readings:
        assert loaded.keys() == state.keys()
        assert all(same(loaded[name], tensor) for name, tensor in state.items())
    assert list(read_index(written).tensors) == list(index.tensors)


@settings(max_examples=40, deadline=None)
@given(state=state_dicts())
def test_the_library_s_own_file_is_written_again_byte_by_byte(tmp_path_factory: Folders, state: Any) -> None:
    path = save(state, tmp_path_factory.mktemp("w") / "w.safetensors")
    assert rewrite(read_index(path), path.with_name("new.safetensors")).read_bytes() == path.read_bytes()


def test_data_of_a_large_file_begin_as_far_from_a_page_as_in_their_source(tmp_path: Path) -> None:
    """Then the system copies whole pages, although the new header has another length."""
    state = {"a": torch.randn(512, 513), "b": torch.randn(7)}
    save_tensors(state, tmp_path / "w.safetensors")
    source = read_index(tmp_path / "w.safetensors")
    rows = [source.tensors["a"].rows(start, start + 128) for start in range(0, 512, 128)]
    pieces = [Piece(f"a.{'long' * 30}.{index}", one.shape, (one,)) for index, one in enumerate(rows)]
    pieces.append(whole(source.tensors["b"]))
    path = write_weights(tmp_path, [OutputFile("o.safetensors", pieces, {})])
    starts = [min(t.storage.start for t in index.tensors.values()) for index in (source, read_index(path))]
    assert starts[0] != starts[1]
    assert starts[0] % mmap.PAGESIZE == starts[1] % mmap.PAGESIZE
    found = load_file(path)
    assert torch.equal(torch.cat([found[piece.name] for piece in pieces[:4]]), state["a"])
    assert torch.equal(found["b"], state["b"])


def test_shared_tensors_stay_shared_and_others_get_a_storage_of_their_own(tmp_path: Path) -> None:
    base, buffer = torch.randn(4, 6), torch.randn(10)
    state = {"base": base, "tied": base, "rows": base[1:3], "columns": base[:, ::2], "first": buffer[:3]}
    index = read_index(save({**state, "rest": buffer[3:7]}, tmp_path / "w.pth"))
    path = rewrite(index, tmp_path / "new.pth")
    loaded = torch.load(path, weights_only=True)
    places = {name: tensor.untyped_storage().data_ptr() for name, tensor in loaded.items()}
    assert len({places[name] for name in ("base", "tied", "rows", "columns")}) == 1
    assert len(set(places.values())) == 3
    assert loaded["columns"].stride() == (6, 2)
    assert loaded["first"].untyped_storage().nbytes() == 3 * 4
    assert set(load_file(rewrite(index, tmp_path / "new.safetensors"))) == {*state, "rest"}


@pytest.mark.slow
def test_storages_and_places_above_four_gib(tmp_path: Path) -> None:
    nbytes = (4 << 30) + 64
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(nbytes)  # a file of holes
    giant = contiguous("giant", "uint8", (nbytes,), ByteRange(tmp_path / "w.bin", 0, nbytes))
    small = contiguous("small", "uint8", (3,), ByteRange(tmp_path / "w.bin", 5, 8))
    path = write_weights(tmp_path, [OutputFile("w.pth", [whole(giant), whole(small)], {})])
    assert [tensor.storage.start % 64 for tensor in read_index(path).tensors.values()] == [0, 0]
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded["giant"].shape == (nbytes,)
    assert loaded["small"].tolist() == [0, 0, 0]
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    path.unlink()


def test_whole_tensors_keep_the_sum_of_their_source(tmp_path: Path) -> None:
    """They are not read on the way, so what was damaged before is found by whoever reads the result."""
    save({"kept": torch.randn(300), "cut": torch.randn(4, 6)}, tmp_path / "w.pth")
    index = read_index(tmp_path / "w.pth")
    kept, cut = index.tensors["kept"], index.tensors["cut"]
    pieces = [whole(kept), *(Piece(f"cut.{row}", (1, 6), (cut.rows(row, row + 1),)) for row in range(4))]
    path = write_weights(tmp_path, [OutputFile("new.pth", pieces, {})])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        sums = {
            entry.filename.rpartition("/")[2]: entry.CRC for entry in archive.infolist() if "/data/" in entry.filename
        }
    assert sums["0"] == kept.storage.crc
    with (tmp_path / "w.pth").open("r+b") as file:
        file.seek(kept.storage.start)
        file.write(b"\xff\xff\xff")
    with zipfile.ZipFile(write_weights(tmp_path, [OutputFile("new.pth", pieces, {})])) as archive:
        assert archive.testzip() == "new/data/0"


# What is wrong with a header, by what it is made of; the data are 8 bytes.
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS: list[tuple[Any, str]] = [
    (b"[]", "a list, not an object"),
    (b"", "no JSON"),
    (b"{", "no JSON"),
    (b'{"a":' * 5000, "no JSON"),
    (b'{"\xff": 1}', "no JSON"),
    (b'{"a": {"dtype": "F32", "dtype": "F32"}}', "`dtype` twice"),
    ({"a": [F32]}, "`a` has no known type"),
    ({"a": F32 | {"dtype": "F4"}}, "`a` has no known type"),
    ({"a": F32 | {"dtype": ["F32"]}}, "`a` has no known type"),
    (b'{"\\ud800":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}', "no proper name"),
    ({"a": F32 | {"shape": [-2]}}, r"`a` has shape \[-2\]"),
    ({"a": F32 | {"shape": [2.0]}}, r"`a` has shape \[2.0\]"),
    ({"a": F32 | {"shape": [True, 2]}}, "`a` has shape"),
    ({"a": F32 | {"shape": None}}, "`a` has shape None"),
    ({"a": F32 | {"shape": [1 << 62, 1 << 62]}}, "`a` has 8 bytes for shape"),
    ({"a": F32 | {"shape": [3]}}, r"`a` has 8 bytes for shape \[3\] of F32"),
    ({"a": F32 | {"data_offsets": [0, 8, 8]}}, "`a` has shape"),
    ({"a": F32 | {"data_offsets": [8, 0]}}, "`a` should lie at bytes 8 to 0 of 8"),
    ({"a": F32 | {"data_offsets": [4, 12]}}, "`a` should lie at bytes 4 to 12 of 8"),
    ({"a": F32 | {"data_offsets": [0, 1 << 70]}}, "`a` should lie at bytes"),
    ({"a": F32, "b": F32}, "`b` overlaps"),
    ({"a": F32 | {"shape": [1], "data_offsets": [4, 8]}}, "`a` leaves a hole"),
    ({"a": F32 | {"shape": [1], "data_offsets": [0, 4]}}, "its tensors end at byte"),
    ({"__metadata__": {"a": 1}, "a": F32}, "its metadata is not text"),
    ({"__metadata__": [], "a": F32}, "its metadata is not text"),
]


@pytest.mark.parametrize(("header", "message"), HEADERS, ids=[message for _, message in HEADERS])
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, header: Any, message: str) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match=message) as error:
        read_index(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x10", b"\xff" * 8 + b"{}", (200_000_000).to_bytes(8, "little") + b"{}"])
def test_a_header_s_length_is_not_believed(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="its header should have"):
        read_index(path)


@pytest.mark.parametrize("form", ["safetensors", "pth", "legacy"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_is_damaged_is_refused_or_lies_within_the_file(
    tmp_path_factory: Folders, form: str, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("w") / f"w.{'pth' if form == 'legacy' else form}"
    state = {"a": torch.randn(5, 7), "b": torch.randn(3).half(), "c": torch.randn(2, 3).t()}
    content = bytearray(save(state, path, legacy=form == "legacy").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        index = read_index(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    for tensor in index.tensors.values():
        assert 0 <= tensor.storage.start <= tensor.storage.stop <= path.stat().st_size
        assert len(stored_bits(tensor)) == tensor.nbytes


def edited(path: Path, change: Callable[[str, bytes], bytes | None], **options: Any) -> Path:
    """Rewrite an archive record by record; None leaves a record out."""
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in records:
            if (new := change(name, content)) is not None:
                archive.writestr(name, new)
    return path


def replaced(part: str, old: bytes, new: bytes | None) -> Callable[[str, bytes], bytes | None]:
    def change(name: str, content: bytes) -> bytes | None:
        if not name.endswith(part):
            return content
        assert old in content
        return None if new is None else content.replace(old, new)

    return change


NUMEL, SHAPE = b"cpuq\x06K\x06", b"K\x02K\x03\x86"
ARCHIVES: list[tuple[str, bytes, bytes | None, str]] = [
    ("data.pkl", b"", None, "no state dict"),
    ("/data/0", b"", None, "`a` lies in storage '0', which is not there"),
    ("data.pkl", NUMEL, NUMEL[:-1] + b"\x07", "`a` lies in 28 bytes, of which 24 are there"),
    ("data.pkl", SHAPE, b"K\x02K\x04\x86", "ends behind its storage of 24 bytes"),
    ("data.pkl", b"FloatStorage", b"QInt8Storage", "storages are of class `torch QInt8Storage`"),
    ("data.pkl", b"_rebuild_tensor_v2", b"_rebuild_qtensor", "calls `torch._utils._rebuild_qtensor`"),
    ("data.pkl", b"}q", b"]q", "sets items of something else"),
    ("byteorder", b"little", b"big", "big-endian"),
]


@pytest.mark.parametrize(("part", "old", "new", "message"), ARCHIVES)
def test_an_archive_that_contradicts_itself_is_refused(
    tmp_path: Path, part: str, old: bytes, new: bytes | None, message: str
) -> None:
    path = save({"a": torch.randn(2, 3)}, tmp_path / "w.pth")
    edited(path, replaced(part, old, new))
    with pytest.raises(CheckpointError, match=message) as error:
        read_index(path)
    assert str(path) in str(error.value)


def test_compressed_doubled_and_overlapping_records_are_refused(tmp_path: Path) -> None:
    path = save({"a": torch.zeros(50), "b": torch.zeros(50)}, tmp_path / "w.pth")
    content = path.read_bytes()
    edited(path, lambda _, content: content, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"record `.*` is compressed"):
        read_index(path)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("w/data/0", bytes(200))
    with pytest.raises(CheckpointError, match="two records of one name"):
        read_index(path)
    # The directory says that `a` is longer than what is left before `b`.
    size = struct.pack("<II", 200, 200)
    at = content.rindex(b"w/data/0")
    path.write_bytes(
        content[: at - 46] + content[at - 46 : at].replace(size, struct.pack("<II", 900, 900)) + content[at:]
    )
    with pytest.raises(CheckpointError, match="`w/data/0` runs into what follows"):
        read_index(path)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return save_sharded(tmp_path, "model", [{"b": torch.randn(3), "a": torch.randn(2)}, {"c": torch.randn(4)}])


def test_shards_are_one_index_in_its_order(shards: Path) -> None:
    index = read_index(shards)
    assert list(index.tensors) == ["b", "a", "c"]
    assert [file.path.name for file in index.files] == [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    assert index.metadata == {"total_size": 1, "kept": "yes"}
    assert WeightsLayout.parse(json.loads(json.dumps(asdict(index.layout()))), shards) == index.layout()


def weight_map(**changes: str) -> Callable[[dict[str, Any]], Any]:
    def change(content: dict[str, Any]) -> Any:
        kept = {name: file for name, file in content["weight_map"].items() if changes.get(name) != ""}
        return {"weight_map": kept | {name: file for name, file in changes.items() if file}}

    return change


FIRST, SECOND = (f"model-0000{k}-of-00002.safetensors" for k in (1, 2))
INDEXES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda _: [], "has no `weight_map`"),
    (lambda _: {"weight_map": {}}, "has no `weight_map`"),
    (lambda _: {"weight_map": {"a": 1}}, "has no `weight_map`"),
    (lambda c: c | {"metadata": [1]}, "has no `weight_map`"),
    (lambda _: '{"weight_map": {"a": "x", "a": "y"}}', "names a tensor twice"),
    (lambda _: "{" * 3, "cannot be read as JSON"),
    (lambda _: '{"a":' * 5000, "cannot be read as JSON"),
    (weight_map(c="gone.safetensors"), r"gone\.safetensors` does not exist"),
    (weight_map(c="../x/c.safetensors"), "outside its folder"),
    (weight_map(c="/etc/passwd"), "outside its folder"),
    (weight_map(c=".."), r"`.*\.\.` is no weights file|outside"),
    (weight_map(c="model.safetensors.index.json"), "is no weights file"),
    (weight_map(d=FIRST), f"{FIRST}` lacks `d`"),
    (weight_map(a=""), f"{FIRST}` holds, without an entry in the index, `a`"),
    (weight_map(a=SECOND), "holds, without an entry in the index, `a`"),
]


@pytest.mark.parametrize(("change", "message"), INDEXES, ids=[message for _, message in INDEXES])
def test_an_index_that_does_not_fit_its_files_is_refused(
    shards: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    new = change(json.loads(shards.read_text()))
    shards.write_text(new if isinstance(new, str) else json.dumps(new))
    with pytest.raises(CheckpointError, match=message):
        read_index(shards)


@pytest.mark.parametrize("name", ["../w.pth", "/tmp/w.pth", "a/b.pth", ".", "w\0.pth"])
def test_a_layout_names_no_file_outside_its_folder(tmp_path: Path, shards: Path, name: str) -> None:
    layout = asdict(read_index(shards).layout())
    for changed in (layout | {"name": name}, layout | {"files": [layout["files"][0] | {"name": name}]}):
        with pytest.raises(CheckpointError, match="outside its folder"):
            WeightsLayout.parse(changed, tmp_path / "heads.json")
    with pytest.raises(CheckpointError, match=r"describes no weights: files\.0\.shapes"):
        WeightsLayout.parse(layout | {"files": [layout["files"][0] | {"shapes": {"a": "x"}}]}, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: {"files": []},
        lambda c: {"files": c["files"] * 2},
        lambda c: {"files": [c["files"][0], c["files"][0] | {"name": "other.pth"}], "order": ["a", "a", "b", "b"]},
        lambda c: {"order": c["order"][1:]},
        lambda c: {"order": [*c["order"], "more"]},
        lambda c: {"name": c["files"][0]["name"]},
        lambda c: {"name": "other.pth", "files": c["files"][:1], "order": []},
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(shards: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    layout = asdict(read_index(shards).layout())
    with pytest.raises(CheckpointError, match="contradict each other"):
        WeightsLayout.parse(layout | change(layout), shards)


def refuse_in_kernel(*_: object) -> int:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


@pytest.mark.parametrize("copy", [None, refuse_in_kernel])
def test_without_the_kernel_s_copy_the_bytes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: object
) -> None:
    path = save({"a": random_bits((300, 1000), torch.int8, 0), "b": torch.randn(7)}, tmp_path / "w.safetensors")
    monkeypatch.setattr(os, "copy_file_range", copy)
    assert rewrite(read_index(path), tmp_path / "new.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("target", ["new.safetensors", "new.pth"])
def test_a_source_that_shrinks_while_it_is_read_is_named(tmp_path: Path, target: str) -> None:
    index = read_index(save({"a": torch.randn(1000)}, tmp_path / "w.safetensors"))
    os.truncate(tmp_path / "w.safetensors", 500)
    with pytest.raises(CheckpointError, match=r"w\.safetensors.*became shorter"):
        rewrite(index, tmp_path / target)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path, small_disk: Path, suffix: str) -> None:
    index = read_index(save({"a": torch.zeros(100_000)}, tmp_path / "w.pth"))
    with pytest.raises(EnvironmentProblem, match="no space left"):
        rewrite(index, small_disk / f"new{suffix}")
    # As much as fits by its own count, but not with the header: the system finds out.
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    index = read_index(save({"a": torch.zeros(free, dtype=torch.uint8)}, tmp_path / "w.pth"))
    with pytest.raises(EnvironmentProblem, match="no space left"):
        rewrite(index, small_disk / f"new{suffix}")
    assert list(small_disk.iterdir()) == []


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    index = read_index(save({"a": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "w.pth"))
    with pytest.raises(CheckpointError, match="`a` is of type complex128, which safetensors lacks"):
        rewrite(index, tmp_path / "new.safetensors")
    with pytest.raises(UsageError, match="no suffix of a weights file"):
        rewrite(index, tmp_path / "new.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


@pytest.mark.parametrize(("name", "message"), [("none.bin", "does not exist"), ("w.onnx", "no weights file")])
def test_other_files_are_named(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_index(tmp_path / name)
    (tmp_path / "w.pth").mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        read_index(tmp_path / "w.pth")
