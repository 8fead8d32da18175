"""What becomes of a diffusers attention: written out for a traced graph, per head, or refused with its reason."""

from collections.abc import Callable
from dataclasses import replace

from diffusers.models.attention_processor import Attention
from torch import nn
from transformers.models.clip.modeling_clip import CLIPAttention

from sdconvert.models.attention_rewrite import (
    BRING_TO_PLAIN_FORM,
    AttentionProcessorRegistry,
    AttentionRewrite,
    rewrite_of,
)
from sdconvert.models.explicit_attention import ExplicitAttnProcessor, split_heads
from sdconvert.models.plain_attention import PlainAttention
from sdconvert.models.refused_attention import RefusedProcessor
from sdconvert.models.sha_clip import SHACLIPAttention, reason_against_clip
from sdconvert.registry import Offender, refuse_together, unknown

__all__ = [
    "BRING_TO_PLAIN_FORM",
    "AttentionProcessorRegistry",
    "AttentionRewrite",
    "ExplicitAttnProcessor",
    "PlainAttention",
    "RefusedProcessor",
    "offender_against_graph",
    "offender_against_heads",
    "per_head",
    "rewrite_of",
    "split_heads",
    "unsupported_reason",
]


def unsupported_reason(attn: Attention | CLIPAttention) -> str | None:
    """Why an attention cannot be rewritten per head, or None if it can."""
    offender = offender_against_heads("", attn)
    return offender.reason if offender else None


def offender_against_heads(path: str, attn: Attention | CLIPAttention) -> Offender | None:
    """The attention at a path as an offender, if it cannot be rewritten per head."""
    if isinstance(attn, CLIPAttention):
        reason = reason_against_clip(attn)
        return Offender(path, type(attn), reason) if reason else None
    return _offender(path, attn, lambda rewrite: rewrite.reason_against_heads())


def offender_against_graph(path: str, attn: Attention) -> Offender | None:
    """The attention at a path as an offender, if it cannot be written out in a static graph."""
    return _offender(path, attn, lambda rewrite: rewrite.reason_against_graph())


def _offender(path: str, attn: Attention, judge: Callable[[AttentionRewrite], str | None]) -> Offender | None:
    processor = type(attn.processor)
    if not AttentionProcessorRegistry.covers(processor):
        offender = unknown(AttentionProcessorRegistry, path, processor)
        return replace(offender, reason=f"its processor {processor.__name__} may compute something else")
    reason = judge(rewrite_of(attn))
    return Offender(path, type(attn), reason) if reason else None


def per_head(attn: Attention | CLIPAttention) -> nn.Module:
    """Rewrite an attention per head.

    Raises:
        UnsupportedModelError: It is more than the rewrites know; the message says what.
    """
    if offender := offender_against_heads("", attn):
        refuse_together("attention cannot be rewritten per head", [offender], hint=BRING_TO_PLAIN_FORM)
    return SHACLIPAttention(attn) if isinstance(attn, CLIPAttention) else rewrite_of(attn).per_head()
