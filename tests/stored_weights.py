"""Weights of every type and layout that a file can hold, and how the tests look at files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sdconvert.io.byte_copy import StoredBytes
from sdconvert.io.stored_tensor import DATA_TYPES, StoredTensor
from sdconvert.io.tensors import save_tensors

DTYPES = [getattr(torch, data_type.name) for data_type in DATA_TYPES.values() if data_type.safetensors]
# Types that came after torch 1.6 have no place in the format before it.
LEGACY_DTYPES = [getattr(torch, data_type.name) for data_type in DATA_TYPES.values() if data_type.storage]


def random_bits(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor of any bits that its type can have: NaN, infinities and subnormal numbers too."""
    size = torch.empty((), dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (torch.Size(shape).numel() * size,), generator=generator)
    return raw.to(torch.uint8).view(dtype).reshape(tuple(shape))


def bits(tensor: Tensor) -> bytes:
    """The elements row-major, as bytes."""
    plain = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().flatten())
    return plain.view(torch.uint8).numpy().tobytes()


def same(one: Tensor, other: Tensor) -> bool:
    """Type, shape and bits are equal."""
    return (one.dtype, one.shape, bits(one)) == (other.dtype, other.shape, bits(other))


def stored_bits(tensor: StoredTensor) -> bytes:
    """The elements of a stored tensor row-major, read from its file."""
    with StoredBytes() as reader:
        return b"".join(bytes(block) for block in reader.blocks([tensor]))


@st.composite
def layouts(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = tuple(DTYPES)) -> Tensor:
    """A tensor of any type in any layout: transposed, strided, sliced, expanded, empty, scalar."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    tensor = random_bits(shape, draw(st.sampled_from(list(dtypes))), draw(st.integers(0, 99)))
    tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    for axis in range(tensor.ndim):
        tensor = tensor[(slice(None),) * axis + (slice(draw(st.integers(0, 1)), None, draw(st.integers(1, 3))),)]
    return tensor.expand(2, *tensor.shape) if draw(st.integers(0, 5)) == 0 else tensor


@st.composite
def state_dicts(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = tuple(DTYPES)) -> dict[str, Tensor]:
    """Any tensors, some of them tied to others or views of them."""
    state = draw(st.dictionaries(st.text("abc._0é", min_size=1, max_size=8), layouts(dtypes), max_size=4))
    for name in list(state):
        match draw(st.sampled_from(["alone", "alone", "tied", "view"])):
            case "tied":
                state[f"{name}.tied"] = state[name]
            case "view" if state[name].ndim:
                state[f"{name}.view"] = state[name][: draw(st.integers(0, 3))]
    return state


def save_sharded(folder: Path, stem: str, shards: Sequence[Mapping[str, Tensor]], suffix: str = ".safetensors") -> Path:
    """Write shards and their index as diffusers names them."""
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}{suffix}"
        save_tensors(tensors, folder / name, {"format": "pt"} if suffix == ".safetensors" else None)
        weight_map |= dict.fromkeys(tensors, name)
    index: dict[str, Any] = {"metadata": {"total_size": 1, "kept": "yes"}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return folder / f"{stem}{suffix}.index.json"
