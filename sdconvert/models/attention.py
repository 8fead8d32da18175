"""The rewrite of attention per head as a plugin: in place, next to the original, until it is fused."""

from typing import Any, ClassVar

from diffusers.models.attention_processor import Attention
from torch import nn

from sdconvert.models.attention_processors import (
    ExplicitAttnProcessor,
    offender_against_heads,
    per_head,
    unsupported_reason,
)
from sdconvert.models.sha import SHAAttention
from sdconvert.plugins import LayerMatch, PatchPluginBlock, PatchPluginContainer
from sdconvert.plugins.base import unwrap
from sdconvert.registry import refuse_together

__all__ = [
    "ExplicitAttnProcessor",
    "SHAAttention",
    "SHAAttentionContainer",
    "SHAAttentionPatch",
    "per_head",
    "unsupported_reason",
]


class SHAAttentionContainer(PatchPluginContainer):
    """Runs a layer's hooks and its inner patches around either form of attention."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run SHA, or MHA while the patch is disabled."""
        enabled = [plugin for plugin in self.plugins if plugin.enabled]
        if not enabled:
            return self._host(*args, **kwargs)
        # Shadowing only the layer's forward leaves its call, and so the hooks on it, in place.
        layer = unwrap(self._host)
        layer.__dict__["forward"] = enabled[0].attention
        try:
            return self._host(*args, **kwargs)
        finally:
            del layer.__dict__["forward"]


class SHAAttentionPatch(PatchPluginBlock):
    """The rewrite of an attention per head, in place, next to the original until it is fused.

    The model computes SHA while the patch is attached, MHA inside `with patch.disabled():`, SHA without the original
    after `fuse()`.

    Raises:
        UnsupportedModelError: The attention is more than plain attention; `wrap_model` lists all such layers before
            it touches any.
    """

    container_cls = SHAAttentionContainer
    wrapable_classes: ClassVar = (Attention,)

    def __init__(self, name: str, host: nn.Module, **kwargs: Any) -> None:
        super().__init__(name, host, **kwargs)
        layer: Any = unwrap(host)
        self.attention = per_head(layer)

    def patched_module(self) -> nn.Module:
        """The attention per head."""
        return self.attention

    @classmethod
    def find_layers(cls, model: nn.Module, *args: Any, **kwargs: Any) -> list[LayerMatch]:
        """The attention layers of a model.

        Raises:
            UnsupportedModelError: Some of them cannot be rewritten; the message lists them all.
        """
        matches = super().find_layers(model, *args, **kwargs)
        offenders = [offender_against_heads(match.path, _attention(match)) for match in matches]
        refused = [offender for offender in offenders if offender]
        refuse_together(
            f"{len(refused)} of {len(matches)} attentions of {type(model).__name__} cannot be rewritten per head",
            refused,
            hint="bring them to plain form, or leave them out with exclude_key=",
        )
        return matches


def _attention(match: LayerMatch) -> Any:
    return unwrap(match.module)
