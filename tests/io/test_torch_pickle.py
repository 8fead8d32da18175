"""A pickle is read as data: what `torch.save` writes is understood, everything else is refused and nothing is run."""

import io
import os
import pickle
import pickletools
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdconvert.errors import CheckpointError
from sdconvert.io.stored_tensor import ByteRange, StoredTensor
from sdconvert.io.torch_pickle import PickleRefused, read_pickle, write_pickle
from sdconvert.io.weights_index import read_index


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.command = f"touch {file}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_command_is_named_and_not_run(tmp_path: Path, legacy: bool) -> None:
    path, trace = tmp_path / "w.pth", tmp_path / "ran"
    torch.save({"a": torch.zeros(1), "b": Hostile(trace)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"calls `posix\.system`; nothing was executed"):
        read_index(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Hostile(trace)))
    assert trace.exists()  # it would have been


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=80, deadline=None)
@given(value=plain, behind=st.binary(max_size=8))
def test_plain_values_are_those_that_were_pickled(value: Any, behind: bytes) -> None:
    file = io.BytesIO(pickle.dumps(value, protocol=2) + behind)
    assert read_pickle(file) == value
    assert file.read() == behind


def program(text: bytes) -> bytes:
    return b"\x80\x02" + text + b"."


def called(name: bytes, arguments: bytes = b")") -> bytes:
    return program(b"c" + name + b"\n" + arguments + b"R")


REFUSED: list[tuple[bytes, str]] = [
    (called(b"os\nsystem", b"X\x02\x00\x00\x00ls\x85"), r"calls `os\.system`"),
    (called(b"builtins\neval"), r"calls `builtins\.eval`"),
    (called(b"torch._utils\n_rebuild_tensor_v2"), "damaged pickle"),
    (called(b"torch._utils\n_rebuild_parameter", b"(K\x01K\x02K\x03t"), "calls `torch._utils._rebuild_parameter`"),
    (called(b"collections\nOrderedDict", b"]\x85"), r"calls `collections\.OrderedDict`"),
    (program(b")R"), "damaged pickle"),
    (program(b"K\x01)R"), "calls `int`"),
    (program(b"(ios\nsystem\n"), "instruction INST"),
    (program(b"cos\nsystem\n)\x81"), "instruction NEWOBJ"),
    (program(b"\x82\x01"), "instruction EXT1"),
    (program(b"P1\n"), "instruction PERSID"),
    (program(b"]}b"), "sets the state of an object"),
    (program(b"}}b"), "sets the state of an object"),
    (program(b"K\x01K\x01K\x01s"), "sets items of something else"),
    (program(b"}(K\x01u"), "sets items of something else"),
    (program(b"}]K\x01s"), "a dict has a list as key"),
    (program(b"}K\x01K\x02sK\x01K\x02s"), "a dict has the key 1 twice"),
    (program(b"K\x01K\x01a"), "appends to something else"),
    (program(b"(" * 20000 + b"t" * 20000 + b"Q"), "damaged pickle"),
    (program(b")" + b"\x85" * 20000 + b"(" + b"))))tQ"), "damaged pickle|refers to"),
    (program(b"X\xff\xff\xff\xffab"), "damaged pickle"),
    (program(b"h\x07"), "damaged pickle"),
    (b"\x80\x02K\x01", "damaged pickle|ends early"),
    (b"", "damaged pickle|ends early"),
    (b"\xff\xff", "damaged pickle"),
    (b".", "damaged pickle"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_what_no_state_dict_needs_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(PickleRefused, match=message):
        read_pickle(io.BytesIO(text))


def test_a_memo_far_away_takes_no_memory() -> None:
    # Python's own unpickler would make a table of four thousand million places.
    assert read_pickle(io.BytesIO(program(b"K\x01r" + struct.pack("<I", 0xFFFFFFFF)))) == 1


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_bytes_are_read_or_refused(data: st.DataObject) -> None:
    tensor = StoredTensor("a", "float32", (2, 3), ByteRange(Path("x"), 0, 24), 0, (3, 1))
    content = bytearray(write_pickle([(tensor, "0", 24)]))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_pickle(io.BytesIO(content))
    except PickleRefused:
        return


def test_what_is_written_is_protocol_2_without_a_memo() -> None:
    big = 1 << 40
    tensor = StoredTensor("é", "float8_e5m2", (big,), ByteRange(Path("x"), 0, 2 * big), big, (1,))
    text = write_pickle([(tensor, "7", 2 * big)])
    names = {opcode.name for opcode, _, _ in pickletools.genops(text)}
    assert not names & {"BINPUT", "BINGET", "MEMOIZE", "FRAME"}
    (read,) = read_pickle(io.BytesIO(text)).values()
    assert (read.dtype, read.shape, read.offset, read.strides) == ("float8_e5m2", (big,), big, (1,))
    assert (read.storage.key, read.storage.nbytes) == ("7", 2 * big)
