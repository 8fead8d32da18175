"""Bytes of stored tensors, moved and compared in blocks: memory does not depend on how large the tensors are."""

import errno
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from sdconvert.io.stored_tensor import DATA_TYPES, ByteRange, StoredTensor, damaged, runs

BLOCK_BYTES = 256 << 10  # fits the second-level cache; larger blocks were slower
_MATERIALIZED_BYTES = 16 << 20
_UNSUPPORTED = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)


class StoredBytes:
    """Reads stored tensors; a context in which each file is opened once."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def blocks(self, sources: Iterable[StoredTensor]) -> Iterator[memoryview]:
        """Yield the sources' elements, row-major, in blocks of `BLOCK_BYTES`; each is valid until the next.

        A whole block is the buffer itself: `.obj` of all but the last is a bytearray of as many bytes.

        Raises:
            CheckpointError: A file became shorter than it was.
        """
        block = memoryview(bytearray(BLOCK_BYTES))
        filled = 0
        for run in runs(sources):
            for part in [run] if isinstance(run, ByteRange) else self._gathered(run):
                position, length = 0, part.nbytes
                while position < length:
                    space = block[filled : filled + length - position]
                    if isinstance(part, memoryview):
                        space[:] = part[position : position + len(space)]
                        got = len(space)
                    else:
                        got = os.preadv(self._descriptor(part.file), [space], part.start + position)
                        self._require(got, part.file)
                    position, filled = position + got, filled + got
                    if filled == BLOCK_BYTES:
                        yield block
                        filled = 0
        if filled:
            yield block[:filled]

    def copy(self, sources: Iterable[StoredTensor], out: int) -> None:
        """Append the sources' elements, row-major, to an open file, inside the kernel where it can.

        Args:
            sources: Views of any layout.
            out: Descriptor of the file, at the place to write to.

        Raises:
            CheckpointError: A source's file became shorter than it was.
        """
        for run in runs(sources):
            if isinstance(run, StoredTensor):
                for part in self._gathered(run):
                    write_all(out, part)
            else:
                self._copy_range(run, out)

    def _copy_range(self, run: ByteRange, out: int) -> None:
        descriptor, position = self._descriptor(run.file), run.start
        copy = getattr(os, "copy_file_range", None)  # Linux only
        while copy and position < run.stop:
            try:
                done = copy(descriptor, out, run.stop - position, position)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                break
            self._require(done, run.file)
            position += done
        block = memoryview(bytearray(BLOCK_BYTES))
        while position < run.stop:
            done = os.preadv(descriptor, [block[: run.stop - position]], position)
            self._require(done, run.file)
            write_all(out, block[:done])
            position += done

    def _gathered(self, tensor: StoredTensor) -> Iterator[memoryview]:
        """Yield the elements of a strided view row-major, some rows at a time; its file is mapped meanwhile."""
        import numpy as np  # only here: a plain checkpoint is converted without it

        size, storage = DATA_TYPES[tensor.dtype].nbytes, tensor.storage
        start = storage.start - storage.start % mmap.ALLOCATIONGRANULARITY
        descriptor = self._descriptor(storage.file)
        with mmap.mmap(descriptor, storage.stop - start, access=mmap.ACCESS_READ, offset=start) as mapped:
            rows = np.ndarray(
                tensor.shape,
                dtype=f"V{size}",
                buffer=mapped,
                offset=storage.start - start + tensor.offset * size,
                strides=[stride * size for stride in tensor.strides],
            )
            step = max(1, _MATERIALIZED_BYTES // (math.prod(tensor.shape[1:]) * size))
            try:
                for row in range(0, len(rows), step):
                    yield memoryview(rows[row : row + step].tobytes())
            finally:
                del rows  # the map cannot be closed while an array looks into it

    def _descriptor(self, file: Path) -> int:
        if file not in self._files:
            self._files[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[file]

    @staticmethod
    def _require(got: int, file: Path) -> None:
        if got == 0:
            raise damaged(file, "it became shorter while it was read")


def first_difference(one: Iterable[StoredTensor], other: Iterable[StoredTensor]) -> int | None:
    """Return the position of the first byte in which two sequences of elements differ; None if they are equal.

    Args:
        one: Views of any layout.
        other: Of as many bytes.
    """
    with StoredBytes() as reader:
        position = 0
        for left, right in zip(reader.blocks(one), reader.blocks(other), strict=True):
            # Buffers are compared at once; views of them would be compared byte by byte.
            whole = len(left) == len(right) == BLOCK_BYTES
            if left.obj != right.obj if whole else left.tobytes() != right.tobytes():
                return position + next(i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b)
            position += len(left)
    return None


def write_all(out: int, data: memoryview) -> None:
    """Write all of some bytes to an open file."""
    position = 0
    while position < len(data):
        position += os.write(out, data[position:])
