"""What a model family is: the inputs and outputs of its static graph, its blocks, its attention layers.

An adapter stands between two forms of one model: the call that a pipeline makes (`unet(sample, timestep, …)`) and the
static graph that a phone runs (named tensors in, named tensors out). `pack` and `unpack` translate.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sdconvert.adapters.capabilities import AdapterCapabilities
from sdconvert.adapters.layers import attending_layers
from sdconvert.adapters.spec import (
    AttentionLayer,
    BlockRef,
    GraphSize,
    IOSpec,
    Tensors,
    TensorSpec,
    random_inputs,
    specs,
)
from sdconvert.errors import UsageError
from sdconvert.models.attention_processors import BRING_TO_PLAIN_FORM
from sdconvert.registry import ClassRegistry, Offender, refuse_together


class ModelAdapter(ABC):
    """Covers one model of a family.

    Args:
        model: The model; it is never changed for good.
    """

    graph_name: ClassVar[str]
    """Name of the static graph, and of the pipeline attribute that it can replace."""
    positional: ClassVar[tuple[str, ...]]
    """Names of the arguments that a pipeline passes by position."""
    capabilities: ClassVar[AdapterCapabilities] = AdapterCapabilities()
    """What sdconvert can do with the family."""
    input_ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """Ranges of graph inputs that calibration data need not show whole, such as a mask's."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @abstractmethod
    def pack(self, call: Mapping[str, Any]) -> Tensors:
        """Turn the arguments of a pipeline's call, by name, into the graph's inputs, in the graph's order."""

    @abstractmethod
    def unpack(self, outputs: Tensors) -> Any:
        """Turn the graph's outputs into what the pipeline's call returns."""

    @abstractmethod
    def graph_forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the model on the graph's inputs, in order; what tracing follows."""

    @abstractmethod
    def output_names(self, count: int) -> tuple[str, ...]:
        """Names of the graph's `count` outputs."""

    @abstractmethod
    def io_spec(self, size: GraphSize | None = None) -> IOSpec:
        """Inputs and outputs of the graph, from the model's config alone.

        Args:
            size: What the config leaves open; None: all defaults.

        Raises:
            UsageError: The config does not say a size that `size` leaves open.
        """

    @abstractmethod
    def block_paths(self) -> Sequence[str]:
        """Paths of the parts that hold the graph's parameters, in the order in which they first run."""

    def blocks(self) -> list[BlockRef]:
        """The parts that hold the graph's parameters, in the order in which they first run."""
        return [BlockRef(path, self.model.get_submodule(path)) for path in self.block_paths()]

    def dummy_inputs(self, spec: IOSpec | None = None, seed: int = 0) -> Tensors:
        """Random inputs of the graph, the same for the same seed; see `random_inputs`."""
        return random_inputs(spec or self.io_spec(), seed)

    def size_of(self, inputs: Tensors) -> GraphSize:
        """The size of the graph that takes such inputs, as far as they tell: the first picture's, the first text's."""
        height, width = next((one.shape[2:] for one in inputs.values() if one.ndim == 4), (None, None))
        texts = (
            one.shape[1] for one in inputs.values() if one.ndim == 3 or (one.ndim == 2 and one.dtype == torch.int32)
        )
        return GraphSize(height, width, next(texts, GraphSize.tokens))

    def require_inputs(self, inputs: Tensors) -> None:
        """Check that the graph takes these inputs, in this order.

        Raises:
            UsageError: A name, shape or type is another; the message says which.
        """
        expected = self.io_spec(self.size_of(inputs)).inputs
        found = specs(inputs)
        model = f"the {self.graph_name} graph of a {type(self.model).__name__}"
        if [one.name for one in found] != [one.name for one in expected]:
            raise UsageError(
                f"the inputs {', '.join(inputs) or 'of no name'} are not those of {model}",
                hint=f"it takes {', '.join(one.name for one in expected)}",
            )
        for one, other in zip(expected, found, strict=True):
            if (one.shape, one.dtype) != (other.shape, other.dtype):
                raise UsageError(
                    f"`{one.name}` is {other.dtype} {list(other.shape)}; {model} takes {one.dtype} {list(one.shape)}",
                    hint="give inputs of this model, as the calibration of its own pipeline makes them",
                )

    def surgery(self) -> ExitStack:
        """Changes of the model that hold while it is a static graph; leaving the stack undoes them."""
        return ExitStack()

    def offenders(self) -> Iterable[Offender]:
        """What else of the model has no place in the graph; overridden by families with such options."""
        return ()

    def in_graph(self, path: str) -> bool:
        """Whether a layer is part of the graph."""
        return True

    def check(self) -> None:
        """Refuse a model that cannot be a static graph.

        Raises:
            UnsupportedModelError: Names every layer that stands in the way, why, and what to do.
        """
        rewrites, unknown = attending_layers(self.model)
        offenders = [*unknown, *(offender for rewrite in rewrites if (offender := rewrite.offender()))]
        offenders = [one for one in offenders if self.in_graph(one.path)] + list(self.offenders())
        name = f"{type(self.model).__name__} ({self.graph_name})"
        refuse_together(f"{name} cannot be a static graph", offenders, hint=BRING_TO_PLAIN_FORM)

    @contextmanager
    def as_graph(self) -> Iterator[nn.Module]:
        """The model as a module of positional inputs and a tuple of outputs, with attention written out.

        Raises:
            UnsupportedModelError: As `check`.
        """
        self.check()
        with self.surgery() as stack:
            for rewrite in attending_layers(self.model)[0]:
                if self.in_graph(rewrite.path):
                    stack.enter_context(rewrite.written_out())
            yield _GraphForm(self)

    @torch.no_grad()
    def run(self, inputs: Tensors) -> Tensors:
        """Run the fp32 model on the graph's inputs and name its outputs."""
        with self.as_graph() as graph:
            outputs = graph(*inputs.values())
        return dict(zip(self.output_names(len(outputs)), outputs, strict=True))

    def config(self) -> dict[str, Any]:
        """The model's configuration, as its `config.json` has it."""
        model: Any = self.model
        # transformers keeps it on the config object, diffusers on the model.
        written = model.to_json_string() if hasattr(model, "to_json_string") else model.config.to_json_string()
        config: dict[str, Any] = json.loads(written)
        return config

    def attention_layers(self) -> list[AttentionLayer]:
        """All attention layers of the graph, in the order of the modules.

        Raises:
            UnsupportedLayerError: A layer attends and is of a class that nothing is registered for.
        """
        rewrites, unknown = attending_layers(self.model)
        unknown = [offender for offender in unknown if self.in_graph(offender.path)]
        refuse_together(f"{type(self.model).__name__} has layers of unknown class that attend", unknown, hint="")
        return [rewrite.describe() for rewrite in rewrites if self.in_graph(rewrite.path)]


class _GraphForm(nn.Module):
    """`model` is the only child, so that every tensor's module path begins with `model.`."""

    def __init__(self, adapter: ModelAdapter) -> None:
        super().__init__()
        self.model = adapter.model
        self._forward = adapter.graph_forward

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._forward(*inputs)


def require_known_arguments(call: Mapping[str, Any], known: set[str]) -> None:
    """Refuse arguments of a pipeline's call that a static graph has no place for; None asks for nothing.

    Raises:
        UsageError: Names them.
    """
    asked = {name for name, value in call.items() if value is not None and name != "return_dict"}
    if unknown := sorted(asked - known):
        raise UsageError(f"a static graph takes no {', '.join(unknown)}", hint=f"it takes {', '.join(sorted(known))}")


def sample_size(config: Any, size: GraphSize) -> tuple[int, int]:
    """Height and width of a graph's sample: the asked ones, else the config's.

    Raises:
        UsageError: Neither says one.
    """
    given = getattr(config, "sample_size", None)
    pair = tuple(given) if isinstance(given, list | tuple) else (given, given)
    height, width = size.height or pair[0], size.width or pair[1]
    if not height or not width:
        raise UsageError("the model's config names no sample_size", hint="give GraphSize(height=…, width=…)")
    return int(height), int(width)


def sample_spec(name: str, channels: int, size: tuple[int, int]) -> TensorSpec:
    """A tensor (1, channels, height, width)."""
    return TensorSpec(name, (1, channels, *size))


AdapterRegistry: ClassRegistry[type[ModelAdapter]] = ClassRegistry("adapter", ModelAdapter)
