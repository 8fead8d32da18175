"""The registry of what becomes of diffusers' attention, by the class of its processor.

The rewrite looks at the layer, processor included. A subclass with a `__call__` of its own may compute anything, so its
ancestors do not answer for it.
"""

from abc import ABC, abstractmethod
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

from sdconvert.errors import UnsupportedAttentionProcessorError
from sdconvert.registry import ClassRegistry

BRING_TO_PLAIN_FORM = "bring these layers to plain form, or leave them out"


class AttentionRewrite(ABC):
    """What becomes of a diffusers attention whose processor is of a registered class.

    Args:
        attn: The layer; `attn.processor` is the processor itself.
    """

    def __init__(self, attn: Attention) -> None:
        self.attn = attn

    @abstractmethod
    def reason_against_graph(self) -> str | None:
        """Why the layer cannot be written out as MatMul, Softmax, MatMul, or None if it can."""

    @abstractmethod
    def reason_against_heads(self) -> str | None:
        """Why the layer cannot be written per head, or None if it can."""

    @abstractmethod
    def explicit_processor(self) -> Any:
        """A processor that computes the same with ops that a traced graph can show."""

    @abstractmethod
    def per_head(self) -> nn.Module:
        """The layer per head: projections `<projection>_convs.{i}`, and its own norms and `to_out`."""


AttentionProcessorRegistry: ClassRegistry[type[AttentionRewrite]] = ClassRegistry(
    "attention processor", AttentionRewrite, UnsupportedAttentionProcessorError, method="__call__"
)


def rewrite_of(attn: Attention) -> AttentionRewrite:
    """What becomes of a layer.

    Raises:
        UnsupportedAttentionProcessorError: Nothing is known about its processor.
    """
    return AttentionProcessorRegistry.lookup(type(attn.processor))(attn)
