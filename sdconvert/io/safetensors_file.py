"""Safetensors without the library: the header read with suspicion, files written by copying byte ranges.

    8 bytes   length n of the header, little-endian
    n bytes   {"__metadata__": {…}, "<name>": {"dtype": "F32", "shape": […], "data_offsets": [start, stop]}, …}
    data      without holes; larger element types first, so that every tensor is aligned to its own

The library itself costs an import of torch, which is more memory and time than reading a header.
"""

import json
import mmap
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from sdconvert.errors import CheckpointError
from sdconvert.io.byte_copy import StoredBytes
from sdconvert.io.stored_tensor import DATA_TYPES, ByteRange, Piece, StoredTensor, contiguous, damaged, is_text

_HEADER_BYTES = 100_000_000  # the library's limit
_METADATA = "__metadata__"
_Entry = TypeVar("_Entry", Piece, StoredTensor)
_WORTH_PADDING = 1 << 20  # bytes of data
_BY_NAME = {data_type.safetensors: data_type for data_type in DATA_TYPES.values() if data_type.safetensors}


def read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read the header: tensors in its order, and its metadata.

    Raises:
        CheckpointError: Anything in it contradicts the format or the file's size.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_BYTES):
            raise damaged(path, f"its header should have {length} bytes")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise damaged(path, f"its header is a {type(header).__name__}, not an object")
    metadata = header.pop(_METADATA, {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise damaged(path, "its metadata is not text")
    tensors = {name: _tensor(path, name, entry, 8 + length, size) for name, entry in header.items()}
    position = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.storage.start, tensor.storage.stop)):
        if tensor.storage.start != position:
            problem = "overlaps the one before it" if tensor.storage.start < position else "leaves a hole before it"
            raise damaged(path, f"`{tensor.name}` {problem}")
        position = tensor.storage.stop
    if position != size:
        raise damaged(path, f"its tensors end at byte {position}")
    return tensors, metadata


def write_safetensors(path: Path, pieces: Sequence[Piece], metadata: Mapping[str, str]) -> None:
    """Write a file; neighbours that stay neighbours are copied as one range.

    Args:
        path: Of the file, which is overwritten.
        pieces: In the order of the header's keys.
        metadata: Text kept in the header.

    Raises:
        CheckpointError: A tensor's type does not exist in this format.
    """
    header, stored = safetensors_header(pieces, metadata)
    if sum(piece.nbytes for piece in stored) >= _WORTH_PADDING:
        header = _padded(header, stored[0].sources[0].bytes.start)
    size = len(header) + sum(piece.nbytes for piece in stored)
    # Opened without truncation: ext4 writes a truncated file to the disk when it is closed, 0.6 s of 1.6 for 1.4 GB.
    with path.open("r+b", buffering=0) as file, StoredBytes() as reader:
        # A file system that knows the size finds its blocks at once: a third less time for 4.4 GB on ext4.
        os.posix_fallocate(file.fileno(), 0, size)
        file.write(header)
        reader.copy((source for piece in stored for source in piece.sources), file.fileno())
        written = file.tell()
    if written != size:
        raise CheckpointError(
            f"`{path.name}` has {written} bytes instead of {size}",
            hint="a source changed while it was read, or holds other amounts than its pieces say",
        )


def safetensors_header(
    pieces: Sequence[_Entry], metadata: Mapping[str, str] = MappingProxyType({})
) -> tuple[bytes, list[_Entry]]:
    """Make all of a file that comes before the data.

    Args:
        pieces: In the order of the header's keys.
        metadata: Text kept in the header.

    Returns:
        The bytes, and the pieces in the order in which their data follow.

    Raises:
        CheckpointError: A tensor's type does not exist in this format.
    """
    # A stable order: a file that the library wrote keeps the places of all its tensors.
    stored = sorted(pieces, key=lambda piece: -DATA_TYPES[piece.dtype].nbytes)
    places, position = {}, 0
    for piece in stored:
        places[piece.name] = [position, position + piece.nbytes]
        position += piece.nbytes
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    for piece in pieces:
        name = DATA_TYPES[piece.dtype].safetensors
        if name is None:
            raise CheckpointError(
                f"`{piece.name}` is of type {piece.dtype}, which safetensors lacks", hint="write .pth instead"
            )
        header[piece.name] = {"dtype": name, "shape": list(piece.shape), "data_offsets": places[piece.name]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, stored


def _padded(header: bytes, start: int) -> bytes:
    """Have data begin as far from a page's start as in their source: whole pages are copied in a tenth less time."""
    text = header[8:] + b" " * ((start - len(header)) % mmap.PAGESIZE // 8 * 8)
    return len(text).to_bytes(8, "little") + text


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise damaged(path, f"its header has `{name}` twice")
    return found


def _tensor(path: Path, name: str, entry: Any, data: int, size: int) -> StoredTensor:
    dtype = _BY_NAME.get(str(entry.get("dtype"))) if isinstance(entry, dict) else None
    if dtype is None or not is_text(name):
        raise damaged(path, f"`{name}` has no known type or no proper name: {str(entry)[:80]}")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2):
        raise damaged(path, f"`{name}` has shape {str(shape)[:40]} and offsets {str(offsets)[:40]}")
    start, stop = offsets
    if not start <= stop <= size - data:
        raise damaged(path, f"`{name}` should lie at bytes {start} to {stop} of {size - data}")
    tensor = contiguous(name, dtype.name, tuple(shape), ByteRange(path, data + start, data + stop))
    if tensor.nbytes != stop - start:
        raise damaged(path, f"`{name}` has {stop - start} bytes for shape {str(shape)[:40]} of {dtype.safetensors}")
    return tensor


def _naturals(value: Any) -> bool:
    # JSON's true is an int to Python.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
