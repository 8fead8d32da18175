"""Torch's files without torch: where each storage lies, and archives written by streaming bytes into them.

Since torch 1.6 a file is a zip archive without compression:

    <stem>/data.pkl      the dict, with tensors as views of storages
    <stem>/data/<key>    one storage each, at multiples of 64 bytes
    <stem>/byteorder, <stem>/version

Older ones are five pickles in a row (magic number, protocol, machine, dict, keys of storages), then the storages in
the order of the keys, each behind its count of elements.
"""

import io
import struct
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from sdconvert.io.byte_copy import StoredBytes
from sdconvert.io.stored_tensor import (
    ByteRange,
    Piece,
    StoredTensor,
    contiguous,
    contiguous_strides,
    damaged,
    flat_tensors,
)
from sdconvert.io.stored_zip import StoredZip
from sdconvert.io.torch_pickle import PickledStorage, PickledTensor, PickleRefused, read_pickle, write_pickle

_PICKLE_BYTES = 100_000_000
_LEGACY_PICKLES_BYTES = 16 << 20
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """Find the tensors of a file that `torch.save(state_dict, path)` wrote.

    Raises:
        CheckpointError: The file is damaged, holds something else, or wants something executed.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
            file.seek(0)
            content, storages = _read_zip(path, file) if is_zip else _read_legacy(path, file)
    except (ValueError, zipfile.BadZipFile, struct.error, NotImplementedError, EOFError, KeyError) as error:
        raise damaged(path, error) from error
    return {
        name: _located(path, name, tensor, storages)
        for name, tensor in flat_tensors(path, content, PickledTensor).items()
    }


def _located(path: Path, name: str, tensor: PickledTensor, storages: dict[str, ByteRange]) -> StoredTensor:
    storage = storages.get(tensor.storage.key)
    if storage is None:
        raise damaged(path, f"`{name}` lies in storage {tensor.storage.key!r:.40}, which is not there")
    if storage.nbytes != tensor.storage.nbytes:
        raise damaged(path, f"`{name}` lies in {tensor.storage.nbytes} bytes, of which {storage.nbytes} are there")
    return StoredTensor(name, tensor.dtype, tensor.shape, storage, tensor.offset, tensor.strides)


def _read_zip(path: Path, file: BinaryIO) -> tuple[Any, dict[str, ByteRange]]:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if len(set(names)) != len(names):
            raise ValueError("the archive has two records of one name")
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1 or pickles[0].replace("data.pkl", "constants.pkl") in names:
            raise ValueError("the archive is no state dict")
        root = pickles[0].removesuffix("data.pkl")
        ranges, end = {}, archive.start_dir
        for entry in sorted(entries, key=lambda entry: entry.header_offset, reverse=True):
            name = entry.filename.removeprefix(root)
            ranges[name] = _record(path, file, entry, end)
            end = entry.header_offset
    if "byteorder" in ranges and _content(file, ranges["byteorder"]) != b"little":
        raise ValueError("it is of big-endian byte order")
    content = read_pickle(io.BytesIO(_content(file, ranges["data.pkl"])))
    return content, {name.removeprefix("data/"): at for name, at in ranges.items() if name.startswith("data/")}


def _record(path: Path, file: BinaryIO, entry: zipfile.ZipInfo, end: int) -> ByteRange:
    """Where an entry's bytes lie, which must be before `end`, the next entry."""
    file.seek(entry.header_offset)
    signature, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    start = entry.header_offset + _LOCAL_HEADER.size + name + extra
    if signature != b"PK\3\4" or entry.compress_type or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
        raise ValueError(f"record `{entry.filename}` is compressed, encrypted or damaged")
    if start + entry.file_size > end:
        raise ValueError(f"record `{entry.filename}` runs into what follows it")
    return ByteRange(path, start, start + entry.file_size, entry.CRC)


def _content(file: BinaryIO, record: ByteRange) -> bytes:
    if record.nbytes > _PICKLE_BYTES:
        raise ValueError(f"its pickle has {record.nbytes} bytes")
    file.seek(record.start)
    return file.read(record.nbytes)


def _read_legacy(path: Path, file: BinaryIO) -> tuple[Any, dict[str, ByteRange]]:
    size = path.stat().st_size
    # A copy: whatever lengths the pickles claim, no more than this is ever read.
    pickles = io.BytesIO(file.read(_LEGACY_PICKLES_BYTES))
    if read_pickle(pickles) != _MAGIC or read_pickle(pickles) != _PROTOCOL:
        raise PickleRefused("it is neither of torch's formats")
    machine, content, keys = (read_pickle(pickles) for _ in range(3))
    if not (isinstance(machine, dict) and machine.get("little_endian") is True and isinstance(keys, list)):
        raise PickleRefused("it is of big-endian byte order, or damaged")
    file.seek(pickles.tell())
    storages: dict[str, PickledStorage] = {}
    for tensor in content.values() if isinstance(content, dict) else ():
        if isinstance(tensor, PickledTensor):
            storages[tensor.storage.key] = tensor.storage
    ranges: dict[str, ByteRange] = {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        start = file.tell()
        if not isinstance(key, str) or key not in storages or key in ranges or count != storages[key].count:
            raise PickleRefused(f"storage {key!r:.40} has {count} elements")
        stop = start + storages[key].nbytes
        if stop > size:
            raise PickleRefused(f"storage {key!r:.40} should end at byte {stop}")
        ranges[key] = ByteRange(path, start, stop)
        file.seek(stop)
    return content, ranges


@dataclass(frozen=True)
class _Record:
    """A storage to be written."""

    key: str
    nbytes: int
    sources: tuple[StoredTensor, ...]

    @property
    def crc(self) -> int | None:
        """What the source's file says of the bytes, if they are a record of it, whole."""
        first = self.sources[0]
        is_whole = len(self.sources) == 1 and first.is_contiguous and first.bytes == first.storage
        return first.storage.crc if is_whole else None


def write_torch_file(path: Path, pieces: Sequence[Piece], stem: str) -> None:
    """Write an archive that `torch.load(weights_only=True)` reads, mapped or not.

    Tensors that share a storage go on sharing it where they overlap; every other tensor gets one of its own.

    Args:
        path: Of the file, which is overwritten.
        pieces: In the order of the dict.
        stem: Of the file's final name: torch's name of the archive inside.

    Raises:
        CheckpointError: A source became shorter than it was.
    """
    views = list(_views(pieces))
    pickled = write_pickle((view, record.key, record.nbytes) for view, record in views)
    records = {record.key: record for _, record in views}.values()
    with StoredZip(path, sum(record.nbytes for record in records)) as archive, StoredBytes() as reader:
        archive.write(f"{stem}/data.pkl", pickled)
        archive.write(f"{stem}/byteorder", b"little")
        for record in records:
            archive.copy(f"{stem}/data/{record.key}", record.nbytes, record.sources, reader, record.crc)
        archive.write(f"{stem}/version", b"3\n")


def _views(pieces: Sequence[Piece]) -> Iterator[tuple[StoredTensor, _Record]]:
    """Decide the storages: one per distinct contiguous piece, or the source's whole where views overlap otherwise."""
    shared = _kept_whole(pieces)
    records: dict[Any, _Record] = {}
    for piece in pieces:
        source = piece.sources[0]
        keep = len(piece.sources) == 1 and source.storage in shared
        # Equal sources are tied tensors, whatever their shapes.
        identity = (source.storage, source.dtype) if keep else tuple(_place(one) for one in piece.sources)
        if identity not in records:
            whole = contiguous("", "uint8", (source.storage.nbytes,), source.storage)
            nbytes, sources = (whole.nbytes, (whole,)) if keep else (piece.nbytes, piece.sources)
            records[identity] = _Record(str(len(records)), nbytes, sources)
        view = replace(source.viewed(piece.shape), name=piece.name) if keep else _own(piece)
        yield view, records[identity]


def _own(piece: Piece) -> StoredTensor:
    strides = contiguous_strides(piece.shape)
    return replace(piece.sources[0], name=piece.name, shape=piece.shape, offset=0, strides=strides)


def _place(source: StoredTensor) -> tuple[Any, ...]:
    return (source.bytes, source.dtype) if source.is_contiguous else (source.storage, replace(source, name=""))


def _kept_whole(pieces: Sequence[Piece]) -> set[ByteRange]:
    """Storages of which some piece is no plain range, or overlaps another without being equal to it."""
    by_storage = defaultdict(list)
    for piece in pieces:
        if len(piece.sources) == 1 and piece.nbytes:
            by_storage[piece.sources[0].storage].append(piece.sources[0])
    kept = set()
    for storage, sources in by_storage.items():
        ranges = sorted({(one.bytes.start, one.bytes.stop) for one in sources if one.is_contiguous})
        overlap = any(start < stop for (_, stop), (start, _) in pairwise(ranges))
        if overlap or not all(one.is_contiguous for one in sources):
            kept.add(storage)
    return kept
