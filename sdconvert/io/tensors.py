"""The one reader and writer of weights: safetensors, and torch's pickles restricted to tensors.

Whatever is wrong with a file ends in a `CheckpointError` that names it; whatever is written is written whole.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdconvert.errors import UsageError
from sdconvert.io.files import atomic_file, disk_full, is_disk_full
from sdconvert.io.stored_tensor import damaged, flat_tensors
from sdconvert.io.weights_index import WEIGHTS_SUFFIXES, read_index, require_weights_file

_MAPPED_BYTES = 16 << 20  # of a file that is read tensor by tensor


def load_tensors(path: Path, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Read all tensors of a weights file onto the CPU, memory-mapped where the format allows it.

    Args:
        path: A `.safetensors` file, or a `.bin`, `.pt` or `.pth` file that holds a flat dict of tensors.
        dtype: Floating-point tensors are cast to it; integers keep their type.

    Raises:
        CheckpointError: The file is missing, damaged, or something else than weights.
    """
    require_weights_file(path)
    if path.suffix == ".safetensors":
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise damaged(path, error) from error
    else:
        tensors = _load_pickle(path)
    if dtype is None:
        return tensors
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def load_every_tensor(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a model, as `load_tensors` reads one file.

    Args:
        path: A weights file, or the index of several.

    Raises:
        CheckpointError: As `load_tensors`, or the index is not that of its files.
    """
    index = read_index(path)
    tensors = {name: tensor for file in index.files for name, tensor in load_tensors(file.path).items()}
    return {name: tensors[name] for name in index.order}


def iterate_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors of a weights file one after another, each into memory of its own.

    Unlike `load_tensors`, a reader needs the memory of the tensors that it keeps, and little more: what is mapped of
    the file counts as the process's memory until it is unmapped.

    Raises:
        CheckpointError: As `load_tensors`.
    """
    if path.suffix != ".safetensors":
        yield from ((name, tensor.clone()) for name, tensor in load_tensors(path).items())
        return
    waiting = list(tensor_shapes(path))
    while waiting:
        mapped = 0
        with safe_open(path, framework="pt") as file:
            while waiting and mapped < _MAPPED_BYTES:
                tensor = file.get_tensor(waiting[0]).clone()
                mapped += tensor.nbytes
                yield waiting.pop(0), tensor


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shape of every tensor in a weights file without reading its data.

    Raises:
        CheckpointError: As `load_tensors`.
    """
    return read_index(path).shapes


def read_metadata(path: Path) -> dict[str, str]:
    """Read the text that a safetensors file keeps in its header; other formats have none.

    Raises:
        CheckpointError: As `load_tensors`.
    """
    return dict(read_index(path).files[0].metadata)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to `path`, whole or not at all, in the format of its suffix.

    Tensors that share memory are written once each, so that loading gives independent tensors.

    Args:
        tensors: Any layout and device.
        path: Ends in `.safetensors`, `.bin`, `.pt` or `.pth`.
        metadata: Text kept in the header; safetensors only.

    Raises:
        UsageError: The suffix is unknown, or `metadata` is given for a format that has no place for it.
        EnvironmentProblem: The disk is full.
    """
    if path.suffix not in WEIGHTS_SUFFIXES:
        raise UsageError(f"`{path}` has no suffix of a weights file", hint=f"use one of {', '.join(WEIGHTS_SUFFIXES)}")
    if metadata and path.suffix != ".safetensors":
        raise UsageError(f"`{path}`: {path.suffix} files hold no metadata", hint="write .safetensors")
    own = _independent(tensors)
    with atomic_file(path) as temporary:
        try:
            if path.suffix == ".safetensors":
                save_file(own, temporary, metadata=dict(metadata) if metadata else None)
            else:
                # Through a Python file the system's error survives; given a path, torch reports "unexpected pos".
                with temporary.open("wb") as file:
                    torch.save(own, file)
        except (SafetensorError, RuntimeError) as error:
            if is_disk_full(error):
                raise disk_full(path.parent) from error
            raise


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        # Only torch's zip format can be mapped; files from before torch 1.6 are read into memory.
        content = torch.load(path, map_location="cpu", mmap=_is_zip(path), weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise damaged(path, error) from error
    return flat_tensors(path, content, Tensor)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make every tensor contiguous, alone in its storage, and detached; copy only those that are not."""
    seen: set[tuple[torch.device, int]] = set()
    own = {}
    for name, tensor in tensors.items():
        own[name] = tensor.detach().contiguous()
        storage = own[name].untyped_storage()
        key = (tensor.device, storage.data_ptr())
        if key in seen or storage.nbytes() != tensor.nbytes:
            own[name] = own[name].clone()
        seen.add(key)
    return own


def flatten(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Put a list of named tensors under keys `<index>/<name>`, to be saved as one file."""
    return {f"{index}/{name}": tensor for index, sample in enumerate(samples) for name, tensor in sample.items()}


def unflatten(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Undo `flatten`, but for the order of names, which files do not keep."""
    samples: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition("/")
        samples.setdefault(int(index), {})[name] = tensor
    return [samples[index] for index in sorted(samples)]
