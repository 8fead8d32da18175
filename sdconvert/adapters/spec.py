"""What a static graph takes and gives, as data: names, shapes, types and ranges, and the parts of its model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

AttentionKind = Literal["self", "cross", "pixel"]
Tensors = dict[str, Tensor]
DTYPES = {"float32": torch.float32, "int32": torch.int32}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a static graph; `range` is where its values lie, if that is known."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class IOSpec:
    """All inputs and outputs of a static graph, in its order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class GraphSize:
    """What a model's config leaves open and its static graph fixes."""

    height: int | None = None
    """Rows of the sample; None: the config's `sample_size`."""
    width: int | None = None
    """Columns of the sample; None: the config's `sample_size`."""
    tokens: int = 77
    """Tokens of the text."""
    controlnet: bool = False
    """A UNet that adds a ControlNet's residuals."""
    time_ids: int = 6
    """SDXL's original size, crop and target size; its refiner has 5."""


@dataclass(frozen=True)
class BlockRef:
    """A part of a model that computes as one: an AdaRound unit, a cut of the cache."""

    path: str
    module: nn.Module


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer: where it is, how many heads it has, and what it looks at."""

    path: str
    heads: int
    kind: AttentionKind


def specs(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """Describe named tensors."""
    return tuple(TensorSpec(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items())


def random_inputs(spec: IOSpec, seed: int) -> Tensors:
    """Inputs of a graph: uniform in an input's range, normal where it has none, whole numbers below its upper end."""
    generator = torch.Generator().manual_seed(seed)

    def make(one: TensorSpec) -> Tensor:
        if one.range is None:
            return torch.randn(one.shape, generator=generator)
        low, high = one.range
        if one.dtype == "int32":
            return torch.randint(int(low), int(high) + 1, one.shape, generator=generator, dtype=torch.int32)
        return low + (high - low) * torch.rand(one.shape, generator=generator)

    return {one.name: make(one) for one in spec.inputs}


def numbered(path: str, model: nn.Module) -> Iterator[str]:
    """Paths of the children of a list of modules: `down_blocks.0`, `down_blocks.1` and so on."""
    return (f"{path}.{name}" for name, _ in model.get_submodule(path).named_children())
