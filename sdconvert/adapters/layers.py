"""How layers that attend appear in a static graph, one rewrite per class of layer.

Fused attention kernels hide the tensors that a phone stores; written out, matmul, softmax and matmul are visible.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPAttention

from sdconvert.adapters.spec import AttentionKind, AttentionLayer
from sdconvert.errors import UnsupportedLayerError
from sdconvert.models.attention_processors import offender_against_graph, rewrite_of, split_heads
from sdconvert.registry import ClassRegistry, Offender, unknown

HIDDEN = -100.0
"""What hides a token when it is added to its scores: beside them exp(-100) is nothing, and the mask itself still has
500 steps of a 16-bit grid between 0 and 1."""


class LayerRewrite(ABC):
    """What becomes of a layer that attends while its model is a static graph.

    Args:
        path: Of the layer in its model.
        layer: The layer.
    """

    def __init__(self, path: str, layer: nn.Module) -> None:
        self.path = path
        self.layer: Any = layer

    @abstractmethod
    def describe(self) -> AttentionLayer:
        """Heads and kind."""

    @abstractmethod
    def written_out(self) -> AbstractContextManager[None]:
        """Have the layer compute with ops that a traced graph can show, inside the block."""

    def offender(self) -> Offender | None:
        """The layer, if it cannot be written out."""
        return None


LayerRegistry: ClassRegistry[type[LayerRewrite]] = ClassRegistry(
    "layer", LayerRewrite, UnsupportedLayerError, method="forward"
)


@LayerRegistry.register(Attention)
class DiffusersAttention(LayerRewrite):
    """diffusers' attention; what it computes is its processor's affair."""

    def describe(self) -> AttentionLayer:
        """See `LayerRewrite.describe`."""
        return AttentionLayer(self.path, self.layer.heads, self._kind())

    def _kind(self) -> AttentionKind:
        if not self.layer.is_cross_attention:
            return "self"
        return "pixel" if "pixel_attentions" in self.path or self.path.endswith("attn2_plus") else "cross"

    def offender(self) -> Offender | None:
        """See `LayerRewrite.offender`."""
        return offender_against_graph(self.path, self.layer)

    @contextmanager
    def written_out(self) -> Iterator[None]:
        """See `LayerRewrite.written_out`."""
        processor = self.layer.processor
        self.layer.processor = rewrite_of(self.layer).explicit_processor()
        try:
            yield
        finally:
            self.layer.processor = processor


@LayerRegistry.register(CLIPAttention)
class TransformersAttention(LayerRewrite):
    """The attention of transformers' CLIP. Its mask is causal for text, and a constant."""

    projections: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj")

    def describe(self) -> AttentionLayer:
        """See `LayerRewrite.describe`."""
        return AttentionLayer(self.path, self.layer.num_heads, "self")

    @contextmanager
    def written_out(self) -> Iterator[None]:
        """See `LayerRewrite.written_out`."""
        # The longest text; forward takes a corner of it.
        longest = getattr(self.layer.config, "max_position_embeddings", 0)
        hidden = torch.full((longest, longest), HIDDEN).triu(1)

        def forward(hidden_states: Tensor, *_: Any, **kwargs: Any) -> tuple[Tensor, None]:
            query, key, value = (
                split_heads(getattr(self.layer, name)(hidden_states), self.layer.num_heads) for name in self.projections
            )
            scores = query * self.layer.scale @ key.transpose(-1, -2)
            # Newer versions of transformers say that the mask is causal, older ones give it.
            if kwargs.get("is_causal") or kwargs.get("causal_attention_mask") is not None:
                scores = scores + hidden[: scores.shape[-2], : scores.shape[-1]]
            output = (torch.softmax(scores, dim=-1) @ value).transpose(1, 2).reshape(hidden_states.shape)
            return self.layer.out_proj(output), None

        # In the instance's dictionary, `forward` hides the class's, and hooks on the layer go on working.
        self.layer.__dict__["forward"] = forward
        try:
            yield
        finally:
            del self.layer.__dict__["forward"]


def attending_layers(model: nn.Module) -> tuple[list[LayerRewrite], list[Offender]]:
    """All layers of a model that attend, in the order of its modules, and those of unknown class among them."""
    rewrites, offenders = [], []
    for path, module in model.named_modules():
        if LayerRegistry.covers(type(module)):
            rewrites.append(LayerRegistry.lookup(type(module))(path, module))
        elif _attends(module):
            offenders.append(unknown(LayerRegistry, path, type(module)))
    return rewrites, offenders


def _attends(module: nn.Module) -> bool:
    """Whether a layer has what attention has: a processor that can be set, or projections to q, k and v."""
    children = module._modules.keys()
    return (
        isinstance(module, nn.MultiheadAttention | Attention)
        or (hasattr(type(module), "set_processor") and "processor" in vars(module))
        or children >= {"to_q", "to_k", "to_v"}
        or children >= {"q_proj", "k_proj", "v_proj"}
    )
