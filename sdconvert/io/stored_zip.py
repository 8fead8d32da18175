"""Zip archives without compression, written record by record; a record's bytes may come through the kernel.

The standard library's writer sees every byte to sum it up. Here a record may come with the CRC-32 that another archive
has of the same bytes, and is then copied as a range of a file: what is read later is checked against the sum of whoever
wrote it first. Layout: APPNOTE.TXT of PKWARE, sections 4.3 (records) and 4.5.3 (sizes beyond 4 GiB).
"""

import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from sdconvert.errors import CheckpointError
from sdconvert.io.byte_copy import StoredBytes, write_all
from sdconvert.io.stored_tensor import StoredTensor

ALIGNMENT = 64
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")
_CRC_AT = 14  # in a local header
_VERSION, _UTF_8, _DATE = 45, 0x800, 0x21  # zip64; 1980-01-01, so that equal content gives equal files
_FULL, _FULL_16 = 0xFFFFFFFF, 0xFFFF


class StoredZip:
    """An archive that is written; a context, at whose end it is complete.

    Args:
        path: Of the file, which is overwritten.
        nbytes: Of all records together.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self._path, self._nbytes = path, nbytes
        self._directory: list[bytes] = []

    def __enter__(self) -> Self:
        self._file = self._path.open("r+b" if self._path.exists() else "w+b", buffering=0)
        self._file.truncate()
        # As in `write_safetensors`: a file system that knows the size finds its blocks at once.
        os.posix_fallocate(self._file.fileno(), 0, max(1, self._nbytes))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                self._finish()

    def write(self, name: str, data: bytes) -> None:
        """Add a record of a few bytes."""
        self._begin(name, len(data), zlib.crc32(data))
        write_all(self._file.fileno(), memoryview(data))

    def copy(
        self, name: str, nbytes: int, sources: Iterable[StoredTensor], reader: StoredBytes, crc: int | None
    ) -> None:
        """Add a record of stored elements, row-major, one source after another.

        Args:
            name: Of the record.
            nbytes: Of all sources together.
            sources: Views of any layout.
            reader: Reads them.
            crc: CRC-32 of the bytes; None: they are summed up on the way.

        Raises:
            CheckpointError: A source became shorter than it was, or has other bytes than were announced.
        """
        at = self._begin(name, nbytes, crc or 0)
        start = self._file.tell()
        if crc is not None:
            reader.copy(sources, self._file.fileno())
        else:
            crc = 0
            for block in reader.blocks(sources):
                crc = zlib.crc32(block, crc)
                write_all(self._file.fileno(), block)
            self._patch(at, crc)
        if self._file.tell() != start + nbytes:
            got = self._file.tell() - start
            raise CheckpointError(f"record `{name}` got {got} bytes instead of {nbytes}", hint="did a source change?")

    def _begin(self, name: str, nbytes: int, crc: int) -> int:
        """Write a record's header, so long that its data are aligned; return where it begins."""
        at, text = self._file.tell(), name.encode()
        flags = 0 if name.isascii() else _UTF_8
        is_large, is_far = nbytes >= _FULL, at >= _FULL
        sizes = struct.pack("<2H2Q", 1, 16, nbytes, nbytes) if is_large else b""
        padding = -(at + _LOCAL.size + len(text) + len(sizes) + 4) % ALIGNMENT
        extra = sizes + b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        size = _FULL if is_large else nbytes
        head = (_VERSION, flags, 0, 0, _DATE, crc, size, size, len(text))
        write_all(self._file.fileno(), memoryview(_LOCAL.pack(b"PK\3\4", *head, len(extra)) + text + extra))
        fields = ([nbytes, nbytes] if is_large else []) + ([at] if is_far else [])
        more = struct.pack(f"<2H{len(fields)}Q", 1, 8 * len(fields), *fields) if fields else b""
        rest = (len(more), 0, 0, 0, 0, _FULL if is_far else at)
        self._directory.append(_CENTRAL.pack(b"PK\1\2", _VERSION, *head, *rest) + text + more)
        return at

    def _patch(self, at: int, crc: int) -> None:
        """Put the sum of the record written last where it belongs, in both headers."""
        end = self._file.tell()
        self._file.seek(at + _CRC_AT)
        self._file.write(crc.to_bytes(4, "little"))
        self._file.seek(end)
        place = _CRC_AT + 2  # a directory entry has one field more before it
        entry = self._directory[-1]
        self._directory[-1] = entry[:place] + crc.to_bytes(4, "little") + entry[place + 4 :]

    def _finish(self) -> None:
        start, directory, count = self._file.tell(), b"".join(self._directory), len(self._directory)
        end = start + len(directory)
        records = _END_64.pack(
            b"PK\6\6", _END_64.size - 12, _VERSION, _VERSION, 0, 0, count, count, len(directory), start
        )
        locator = _LOCATOR.pack(b"PK\6\7", 0, end, 1)
        short = (min(count, _FULL_16), min(count, _FULL_16), min(len(directory), _FULL), min(start, _FULL))
        # The long form stands there always: readers take it where a short field is full.
        last = _END.pack(b"PK\5\6", 0, 0, *short, 0)
        write_all(self._file.fileno(), memoryview(directory + records + locator + last))
