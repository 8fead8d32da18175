"""Where a tensor's bytes lie in a file: the description that reading, cutting, copying and comparing share.

Nothing here loads weights or imports torch. Strides and offsets count elements, as torch's do.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import TypeVar

from sdconvert.errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True)
class DataType:
    """A type of elements, by the names of the two formats.

    Args:
        name: As torch names it.
        nbytes: Of one element.
        safetensors: Its name there; None: that format lacks it.
        storage: Class under which `torch.save` files it; None: a newer type, filed as bytes.
    """

    name: str
    nbytes: int
    safetensors: str | None
    storage: str | None = None


DATA_TYPES = {
    data_type.name: data_type
    for data_type in (
        DataType("float64", 8, "F64", "DoubleStorage"),
        DataType("float32", 4, "F32", "FloatStorage"),
        DataType("float16", 2, "F16", "HalfStorage"),
        DataType("bfloat16", 2, "BF16", "BFloat16Storage"),
        DataType("float8_e4m3fn", 1, "F8_E4M3"),
        DataType("float8_e4m3fnuz", 1, "F8_E4M3FNUZ"),
        DataType("float8_e5m2", 1, "F8_E5M2"),
        DataType("float8_e5m2fnuz", 1, "F8_E5M2FNUZ"),
        DataType("float8_e8m0fnu", 1, "F8_E8M0"),
        DataType("complex64", 8, "C64", "ComplexFloatStorage"),
        DataType("complex128", 16, None, "ComplexDoubleStorage"),
        DataType("int64", 8, "I64", "LongStorage"),
        DataType("int32", 4, "I32", "IntStorage"),
        DataType("int16", 2, "I16", "ShortStorage"),
        DataType("int8", 1, "I8", "CharStorage"),
        DataType("uint64", 8, "U64"),
        DataType("uint32", 4, "U32"),
        DataType("uint16", 2, "U16"),
        DataType("uint8", 1, "U8", "ByteStorage"),
        DataType("bool", 1, "BOOL", "BoolStorage"),
    )
}


@dataclass(frozen=True)
class ByteRange:
    """Bytes `start` to `stop` of a file.

    Args:
        file: That holds them.
        start: First byte.
        stop: Behind the last byte.
        crc: CRC-32 of the bytes, where the file has one.
    """

    file: Path
    start: int
    stop: int
    crc: int | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        """Length."""
        return self.stop - self.start


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: a strided view of a storage, which other tensors may share.

    Args:
        name: Key in the state dict.
        dtype: Key of `DATA_TYPES`.
        shape: Elements per axis.
        storage: The bytes that it is a view of.
        offset: Of the first element in the storage.
        strides: Per axis.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    storage: ByteRange
    offset: int
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Length of its elements, one after another."""
        return prod(self.shape) * DATA_TYPES[self.dtype].nbytes

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one after another, the last axis fastest."""
        wanted = contiguous_strides(self.shape)
        return 0 in self.shape or all(
            size == 1 or stride == want for size, stride, want in zip(self.shape, self.strides, wanted, strict=True)
        )

    @property
    def bytes(self) -> ByteRange:
        """Where the elements of a contiguous tensor lie."""
        start = self.storage.start + self.offset * DATA_TYPES[self.dtype].nbytes
        return ByteRange(self.storage.file, start, start + self.nbytes)

    def rows(self, start: int, stop: int) -> "StoredTensor":
        """The view of rows `start` to `stop` of the first axis."""
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, offset=self.offset + start * self.strides[0])

    def viewed(self, shape: tuple[int, ...]) -> "StoredTensor":
        """The same elements in the same order under a shape that only adds or drops axes of length one."""
        strides = iter([stride for size, stride in zip(self.shape, self.strides, strict=True) if size != 1])
        found = tuple(1 if size == 1 else next(strides) for size in shape)
        return replace(self, shape=shape, strides=found)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor whose elements lie one after another."""
    return tuple(accumulate(reversed(shape[1:]), lambda stride, size: stride * max(size, 1), initial=1))[::-1][
        : len(shape)
    ]


def contiguous(name: str, dtype: str, shape: tuple[int, ...], storage: ByteRange) -> StoredTensor:
    """Describe a tensor that fills a storage of its own."""
    return StoredTensor(name, dtype, shape, storage, 0, contiguous_strides(shape))


@dataclass(frozen=True)
class Piece:
    """A tensor to be written: the elements of its sources, one source after another.

    Args:
        name: Key in the file that is written.
        shape: Of as many elements as the sources have together.
        sources: Views of stored tensors, of one type.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[StoredTensor, ...]

    @property
    def dtype(self) -> str:
        """Type of the elements, which is kept."""
        return self.sources[0].dtype

    @property
    def nbytes(self) -> int:
        """Length of its elements."""
        return prod(self.shape) * DATA_TYPES[self.dtype].nbytes


def whole(tensor: StoredTensor) -> Piece:
    """A stored tensor as it is."""
    return Piece(tensor.name, tensor.shape, (tensor,))


def runs(sources: Iterable[StoredTensor]) -> Iterator[ByteRange | StoredTensor]:
    """Join neighbours: as few ranges as possible that hold the sources' elements; strided views stay as they are."""
    run: ByteRange | None = None
    for source in sources:
        if source.nbytes == 0:
            continue
        found = source.bytes if source.is_contiguous else None
        if run and found and (run.file, run.stop) == (found.file, found.start):
            run = replace(run, stop=found.stop)
            continue
        if run:
            yield run
        if found is None:
            yield source
        run = found
    if run:
        yield run


def is_text(name: object) -> bool:
    """Whether a name can be written in UTF-8: both formats let half a surrogate pair through their readers."""
    if not isinstance(name, str):
        return False
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def flat_tensors(path: Path, content: object, tensor: type[T]) -> dict[str, T]:
    """What a pickle holds, if it is weights and nothing else.

    Args:
        path: Of the file, for the message.
        content: Of the pickle.
        tensor: What stands for a tensor in it.

    Raises:
        CheckpointError: It is no flat dict of tensors.
    """
    found = type(content).__name__
    if isinstance(content, Mapping):
        wrong = [
            f"{name!r:.80} is a {type(value).__name__}"
            for name, value in content.items()
            if not (is_text(name) and isinstance(value, tensor))
        ]
        if not wrong:
            return dict(content)
        found = f"{len(content)} entries, of which {', '.join(wrong[:3])}"
    raise CheckpointError(
        f"`{path}` holds no flat dict of tensors but {found}",
        hint="save the model's `state_dict()` alone: torch.save(model.state_dict(), path)",
    )


def damaged(path: Path, reason: object) -> CheckpointError:
    """Make the error for a weights file that is not what its format says."""
    text = (str(reason).strip() or "it ends early").splitlines()[0]
    return CheckpointError(
        f"`{path}` ({path.stat().st_size} bytes) cannot be read as {path.suffix}: {text}",
        hint="the file is truncated, damaged or of another format: copy or download it again",
    )
