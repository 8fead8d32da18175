"""What a model family is, as data: the inputs and outputs of its static graph, and its attention layers.

An adapter stands between two forms of one model: the call that a pipeline makes (`unet(sample, timestep, …)`) and the
static graph that a phone runs (named float tensors in, named float tensors out). `pack` and `unpack` translate.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from sdconvert.adapters.registry import ClassRegistry
from sdconvert.errors import UnsupportedModelError, UsageError
from sdconvert.models.attention import PLAIN_PROCESSORS, ExplicitAttnProcessor

AttentionKind = Literal["self", "cross", "pixel"]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a static graph."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer: where it is, how many heads it has, and what it looks at."""

    path: str
    heads: int
    kind: AttentionKind


class ModelAdapter(ABC):
    """Covers one model of a family.

    Args:
        model: The model; it is never changed for good.
    """

    graph_name: ClassVar[str]
    """Name of the static graph, and of the pipeline attribute that it can replace."""
    positional: ClassVar[tuple[str, ...]]
    """Names of the arguments that a pipeline passes by position."""

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

    def surgery(self) -> ExitStack:
        """Changes of the model that hold while it is a static graph; leaving the stack undoes them."""
        return ExitStack()

    @contextmanager
    def as_graph(self) -> Iterator[nn.Module]:
        """The model as a module of positional inputs and a tuple of outputs, with attention written out.

        Fused attention kernels hide the tensors that a phone stores: inside, matmul, softmax and matmul are visible.

        Raises:
            UnsupportedModelError: An attention has a processor that may compute something else; all are named.
        """
        attentions: list[Any] = [module for module in self.model.modules() if isinstance(module, Attention)]
        processors = [attention.processor for attention in attentions]
        if foreign := sorted({type(one).__name__ for one in processors if type(one) not in PLAIN_PROCESSORS}):
            raise UnsupportedModelError(
                f"attention processors of {self.graph_name} may compute more than attention: {', '.join(foreign)}",
                hint=f"fuse or remove them; known are {', '.join(cls.__name__ for cls in PLAIN_PROCESSORS)}",
            )
        with self.surgery():
            for attention in attentions:
                attention.processor = ExplicitAttnProcessor()
            try:
                yield _GraphForm(self)
            finally:
                for attention, processor in zip(attentions, processors, strict=True):
                    attention.processor = processor

    @torch.no_grad()
    def run(self, inputs: Tensors) -> Tensors:
        """Run the fp32 model on the graph's inputs and name its outputs."""
        with self.as_graph() as graph:
            outputs = graph(*inputs.values())
        return dict(zip(self.output_names(len(outputs)), outputs, strict=True))

    def config(self) -> dict[str, Any]:
        """The model's configuration, as its `config.json` has it."""
        model: Any = self.model
        config: dict[str, Any] = json.loads(model.to_json_string())
        return config

    def attention_layers(self) -> list[AttentionLayer]:
        """All attention layers in the order of the modules."""
        return [
            AttentionLayer(path, module.heads, _attention_kind(path, module))
            for path, module in self.model.named_modules()
            if isinstance(module, Attention)
        ]


class _GraphForm(nn.Module):
    """`model` is the only child, so that every tensor's module path begins with `model.`."""

    def __init__(self, adapter: ModelAdapter) -> None:
        super().__init__()
        self.model = adapter.model
        self._forward = adapter.graph_forward

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._forward(*inputs)


def _attention_kind(path: str, attention: Attention) -> AttentionKind:
    if not attention.is_cross_attention:
        return "self"
    return "pixel" if "pixel_attentions" in path or path.endswith("attn2_plus") else "cross"


def require_known_arguments(call: Mapping[str, Any], known: set[str]) -> None:
    """Refuse arguments of a pipeline's call that a static graph has no place for.

    Raises:
        UsageError: Names them.
    """
    if unknown := sorted(call.keys() - known - {"return_dict"}):
        raise UsageError(f"a static graph takes no {', '.join(unknown)}", hint=f"it takes {', '.join(sorted(known))}")


AdapterRegistry: ClassRegistry[type[ModelAdapter]] = ClassRegistry("adapter")


def specs(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """Describe named tensors."""
    return tuple(TensorSpec(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items())
