"""What is known about diffusers' attention processors: which ones compute plain attention, and why others do not.

`AttentionProcessorRegistry` maps the class of a processor to a rewrite; the rewrite looks at the layer, processor
included. A subclass with a `__call__` of its own may compute anything, so its ancestors do not answer for it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import diffusers.models.attention_processor as of_diffusers
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from sdconvert.errors import UnsupportedAttentionProcessorError
from sdconvert.models.sha import SHAAttention, attention_weights, require_plain_call
from sdconvert.registry import ClassRegistry, Offender, refuse_together, unknown

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
        """The layer per head: projections `to_{q,k,v}_convs.{i}` and its own `to_out`."""


AttentionProcessorRegistry: ClassRegistry[type[AttentionRewrite]] = ClassRegistry(
    "attention processor", AttentionRewrite, UnsupportedAttentionProcessorError, method="__call__"
)


def rewrite_of(attn: Attention) -> AttentionRewrite:
    """What becomes of a layer.

    Raises:
        UnsupportedAttentionProcessorError: Nothing is known about its processor.
    """
    return AttentionProcessorRegistry.lookup(type(attn.processor))(attn)


class ExplicitAttnProcessor:
    """Multi-head attention as MatMul, Softmax, MatMul: what a traced graph is to show.

    diffusers' own processors trace to a fused kernel, or to a `baddbmm` on an uninitialised tensor.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend from `hidden_states` (b, tokens, c) or (b, c, h, w) to `encoder_hidden_states` or to itself.

        `attention_mask` (b, 1, context tokens) is added to the scores.

        Raises:
            UnsupportedModelError: The mask is no such bias.
        """
        require_plain_call(attention_mask, {})
        residual = hidden_states
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.reshape(*hidden_states.shape[:2], -1).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states
        if encoder_hidden_states is not None:
            normalize = attn.norm_encoder_hidden_states if attn.norm_cross else nn.Identity()
            context = normalize(encoder_hidden_states)
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        key = split_heads(attn.to_k(context), attn.heads)
        value = split_heads(attn.to_v(context), attn.heads)
        probabilities = attention_weights(query * attn.scale @ key.transpose(-1, -2), attention_mask)
        # (b, heads, tokens, d) -> (b, tokens, heads * d)
        output: Tensor = (probabilities @ value).transpose(1, 2).reshape(*hidden_states.shape[:2], -1)
        for module in attn.to_out or ():
            output = module(output)
        if residual.ndim == 4:
            output = output.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            output = output + residual
        return output if attn.rescale_output_factor == 1 else output / attn.rescale_output_factor


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(b, tokens, heads * d) -> (b, heads, tokens, d)."""
    return tokens.reshape(*tokens.shape[:-1], heads, -1).transpose(1, 2)


@AttentionProcessorRegistry.register(of_diffusers.AttnProcessor)
@AttentionProcessorRegistry.register(of_diffusers.AttnProcessor2_0)
@AttentionProcessorRegistry.register(of_diffusers.XFormersAttnProcessor)
@AttentionProcessorRegistry.register(of_diffusers.SlicedAttnProcessor)
@AttentionProcessorRegistry.register(ExplicitAttnProcessor)
class PlainAttention(AttentionRewrite):
    """These processors all compute softmax(q k^T) v, and differ in how."""

    def reason_against_graph(self) -> str | None:
        """See `AttentionRewrite.reason_against_graph`."""
        attn = self.attn
        reasons = {
            "it has added key and value projections": attn.added_kv_proj_dim is not None,
            "its projections are fused (fused_projections): call unfuse_qkv_projections()": attn.fused_projections,
            "it has fewer heads for keys and values than for queries": attn.inner_kv_dim != attn.inner_dim,
            "it normalizes queries and keys (qk_norm)": attn.norm_q is not None or attn.norm_k is not None,
            "it has a spatial_norm": attn.spatial_norm is not None,
            "its scores are not scaled, but AttnProcessor2_0 scales them": isinstance(
                attn.processor, of_diffusers.AttnProcessor2_0
            )
            and not attn.scale_qk,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def reason_against_heads(self) -> str | None:
        """See `AttentionRewrite.reason_against_heads`."""
        attn = self.attn
        reasons = {
            "it normalizes its context (cross_attention_norm)": attn.norm_cross is not None,
            "it has a group_norm: it is made for 4-D input, images (b, c, h, w)": attn.group_norm is not None,
            "it adds its input to its output": attn.residual_connection or attn.rescale_output_factor != 1,
            "it has no output projection": attn.to_out is None,
            f"its class {type(attn).__name__} has a forward of its own": type(attn).forward is not Attention.forward,
        }
        reason = self.reason_against_graph() or next((reason for reason, holds in reasons.items() if holds), None)
        return reason or _changed_projection(attn)

    def explicit_processor(self) -> ExplicitAttnProcessor:
        """See `AttentionRewrite.explicit_processor`."""
        return ExplicitAttnProcessor()

    def per_head(self) -> SHAAttention:
        """See `AttentionRewrite.per_head`."""
        return SHAAttention.from_plain_attention(self.attn)


def _changed_projection(attn: Attention) -> str | None:
    """A projection that is more than its weight: slices of the weight would lose the rest."""
    for name in ("to_q", "to_k", "to_v"):
        linear = getattr(attn, name)
        if type(linear) is not nn.Linear:
            return f"its {name} is a {type(linear).__name__}, not a Linear"
        if linear._forward_hooks or linear._forward_pre_hooks:
            return f"its {name} carries a hook or a plugin; fuse or remove it first"
    return None


class RefusedProcessor(AttentionRewrite):
    """A processor that computes more than plain attention, known by name; the reason says what is missing."""

    reason: ClassVar[str]

    def reason_against_graph(self) -> str:
        """See `AttentionRewrite.reason_against_graph`."""
        return f"its processor {type(self.attn.processor).__name__} {self.reason}"

    def reason_against_heads(self) -> str:
        """See `AttentionRewrite.reason_against_heads`."""
        return self.reason_against_graph()

    def explicit_processor(self) -> Any:
        """Refuse.

        Raises:
            UnsupportedAttentionProcessorError: Always.
        """
        raise UnsupportedAttentionProcessorError(self.reason_against_graph(), hint=BRING_TO_PLAIN_FORM)

    def per_head(self) -> nn.Module:
        """Refuse, as `explicit_processor` does."""
        module: nn.Module = self.explicit_processor()
        return module


@AttentionProcessorRegistry.register(of_diffusers.AttnAddedKVProcessor)
@AttentionProcessorRegistry.register(of_diffusers.AttnAddedKVProcessor2_0)
@AttentionProcessorRegistry.register(of_diffusers.SlicedAttnAddedKVProcessor)
@AttentionProcessorRegistry.register(of_diffusers.XFormersAttnAddedKVProcessor)
class AddedKVAttention(RefusedProcessor):
    """Keys and values of the text are put before the image's own."""

    reason = "attends to text through added key and value projections: a rewrite of add_{k,v}_proj is missing"


@AttentionProcessorRegistry.register(of_diffusers.JointAttnProcessor2_0)
@AttentionProcessorRegistry.register(of_diffusers.XFormersJointAttnProcessor)
@AttentionProcessorRegistry.register(of_diffusers.FusedJointAttnProcessor2_0)
class JointAttention(RefusedProcessor):
    """SD3: image and text tokens attend to both, and two tensors come out."""

    reason = (
        "attends over image and text jointly (SD3) and returns both: cutting add_{q,k,v}_proj and their encodings "
        "per head, the norms of q and k, to_add_out, and an adapter for SD3Transformer2DModel are missing"
    )


@AttentionProcessorRegistry.register(of_diffusers.IPAdapterAttnProcessor)
@AttentionProcessorRegistry.register(of_diffusers.IPAdapterAttnProcessor2_0)
@AttentionProcessorRegistry.register(of_diffusers.IPAdapterXFormersAttnProcessor)
@AttentionProcessorRegistry.register(of_diffusers.SD3IPAdapterJointAttnProcessor2_0)
class IPAdapterAttention(RefusedProcessor):
    """IP-Adapter: a second attention, to an image's embedding, is added."""

    reason = (
        "adds attention to an image embedding (IP-Adapter): graph inputs for it and a rewrite of to_{k,v}_ip are "
        "missing; unload_ip_adapter() leaves the plain model"
    )


@AttentionProcessorRegistry.register(of_diffusers.PAGIdentitySelfAttnProcessor2_0)
@AttentionProcessorRegistry.register(of_diffusers.PAGCFGIdentitySelfAttnProcessor2_0)
@AttentionProcessorRegistry.register(of_diffusers.PAGJointAttnProcessor2_0)
@AttentionProcessorRegistry.register(of_diffusers.PAGCFGJointAttnProcessor2_0)
class PerturbedAttention(RefusedProcessor):
    """PAG: part of the batch gets the identity instead of attention."""

    reason = (
        "perturbs attention in part of the batch (PAG), and a static graph has a batch of one: a second graph with "
        "identity attention is missing; load the pipeline without PAG"
    )


@AttentionProcessorRegistry.register(of_diffusers.CustomDiffusionAttnProcessor)
@AttentionProcessorRegistry.register(of_diffusers.CustomDiffusionAttnProcessor2_0)
@AttentionProcessorRegistry.register(of_diffusers.CustomDiffusionXFormersAttnProcessor)
class CustomDiffusionAttention(RefusedProcessor):
    """Custom Diffusion: the processor has projections of its own."""

    reason = "has projections of its own (to_{k,v}_custom_diffusion): write them into the layer's to_k and to_v first"


@AttentionProcessorRegistry.register(of_diffusers.FusedAttnProcessor2_0)
class FusedAttention(RefusedProcessor):
    """One matrix for q, k and v."""

    reason = "multiplies by one matrix for q, k and v (fused_projections): call unfuse_qkv_projections()"


def unsupported_reason(attn: Attention) -> str | None:
    """Why an attention cannot be rewritten per head, or None if it can."""
    offender = offender_against_heads("", attn)
    return offender.reason if offender else None


def offender_against_heads(path: str, attn: Attention) -> Offender | None:
    """The attention at a path as an offender, if it cannot be rewritten per head."""
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


def per_head(attn: Attention) -> nn.Module:
    """Rewrite an attention per head.

    Raises:
        UnsupportedModelError: It is more than plain attention.
    """
    if offender := offender_against_heads("", attn):
        refuse_together("attention cannot be rewritten per head", [offender], hint=BRING_TO_PLAIN_FORM)
    return rewrite_of(attn).per_head()
