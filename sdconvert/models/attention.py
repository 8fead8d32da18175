"""Attention as the HTP wants it: one small graph per head (SHA) instead of one batched over heads (MHA).

MHA and SHA are the same sum: head i of a projection is rows i*d to (i+1)*d of its matrix, and a 1x1 convolution over
(b, C, 1, T) is a matrix product at each token. So the heads' weights are bit-equal slices.
"""

from typing import Any, ClassVar

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor, nn

from sdconvert.errors import UnsupportedModelError
from sdconvert.plugins import LayerMatch, PatchPluginBlock, PatchPluginContainer
from sdconvert.plugins.base import unwrap


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

        Raises:
            UnsupportedModelError: A mask is given.
        """
        _require_plain_call(attention_mask, {})
        residual = hidden_states
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.reshape(*hidden_states.shape[:2], -1).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states
        if encoder_hidden_states is not None:
            normalize = attn.norm_encoder_hidden_states if attn.norm_cross else nn.Identity()
            context = normalize(encoder_hidden_states)
        query = _split_heads(attn.to_q(hidden_states), attn.heads)
        key = _split_heads(attn.to_k(context), attn.heads)
        value = _split_heads(attn.to_v(context), attn.heads)
        probabilities = torch.softmax(query * attn.scale @ key.transpose(-1, -2), dim=-1)
        # (b, heads, tokens, d) -> (b, tokens, heads * d)
        output: Tensor = (probabilities @ value).transpose(1, 2).reshape(*hidden_states.shape[:2], -1)
        for module in attn.to_out or ():
            output = module(output)
        if residual.ndim == 4:
            output = output.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            output = output + residual
        return output if attn.rescale_output_factor == 1 else output / attn.rescale_output_factor


def _split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(b, tokens, heads * d) -> (b, heads, tokens, d)."""
    return tokens.reshape(*tokens.shape[:-1], heads, -1).transpose(1, 2)


# Processors that all compute the same sum. A subclass may compute anything, so only the classes themselves count.
PLAIN_PROCESSORS = (AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor, SlicedAttnProcessor, ExplicitAttnProcessor)


def unsupported_reason(attn: Attention) -> str | None:
    """Why an attention cannot be rewritten per head, or None if it can."""
    processor: type = type(attn.processor)
    reasons = {
        f"its processor {processor.__name__} may compute something else": processor not in PLAIN_PROCESSORS,
        "it has added key and value projections": attn.added_kv_proj_dim is not None,
        "its projections are fused": attn.fused_projections,
        "it has fewer heads for keys and values than for queries": attn.inner_kv_dim != attn.inner_dim,
        "it normalizes queries and keys (qk_norm)": attn.norm_q is not None or attn.norm_k is not None,
        "it normalizes its context (cross_attention_norm)": attn.norm_cross is not None,
        "it has a spatial_norm": attn.spatial_norm is not None,
        "it has a group_norm: it is made for images (b, c, h, w)": attn.group_norm is not None,
        "it adds its input to its output": attn.residual_connection or attn.rescale_output_factor != 1,
        "its scores are not scaled, but AttnProcessor2_0 scales them": processor is AttnProcessor2_0
        and not attn.scale_qk,
        "it has no output projection": attn.to_out is None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None) or _changed_projection(attn)


def _changed_projection(attn: Attention) -> str | None:
    """A projection that is more than its weight: slices of the weight would lose the rest."""
    for name in ("to_q", "to_k", "to_v"):
        linear = getattr(attn, name)
        if type(linear) is not nn.Linear:
            return f"its {name} is a {type(linear).__name__}, not a Linear"
        if linear._forward_hooks or linear._forward_pre_hooks:
            return f"its {name} carries a hook or a plugin; fuse or remove it first"
    return None


class SHAAttention(nn.Module):
    """Attention with 1x1 convolutions and separate products for each head.

        hidden (b, Tq, C)            context (b, Tk, C')
           | transpose, unsqueeze       | transpose, unsqueeze
        (b, C, 1, Tq)                (b, C', 1, Tk)
           |                            |------------------.
        to_q_convs.i                 to_k_convs.i       to_v_convs.i          for each head i
        (b, d, 1, Tq)                (b, d, 1, Tk)      (b, d, 1, Tk)
           | * scale (b, 1, Tq, d)      | (b, 1, d, Tk)    | (b, 1, Tk, d)
           '--------- MatMul -----------'                  |
                 Softmax (b, 1, Tq, Tk)                    |
                        '------------- MatMul -------------'
                                  (b, 1, Tq, d)
        Concat over heads (b, 1, Tq, heads * d) -> squeeze -> to_out (b, Tq, C)

    Args:
        query_dim: C.
        cross_attention_dim: C'.
        heads: Number of heads.
        dim_head: d.
        bias: Of the projections to q, k and v.
        scale: Of the scores.
        to_out: What follows the heads.
        device: Of the projections.
    """

    def __init__(
        self,
        query_dim: int,
        cross_attention_dim: int,
        heads: int,
        dim_head: int,
        bias: bool,
        scale: float,
        to_out: nn.ModuleList,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.scale = scale

        def convs(channels: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Conv2d(channels, dim_head, 1, bias=bias, device=device) for _ in range(heads))

        self.to_q_convs = convs(query_dim)
        self.to_k_convs = convs(cross_attention_dim)
        self.to_v_convs = convs(cross_attention_dim)
        self.to_out = to_out

    @classmethod
    def from_attention(cls, attn: Attention) -> "SHAAttention":
        """Rewrite a diffusers attention; weights are views of its weights, and `to_out` is its own.

        Raises:
            UnsupportedModelError: It is more than plain attention.
        """
        if reason := unsupported_reason(attn):
            raise UnsupportedModelError(
                f"attention cannot be rewritten per head: {reason}",
                hint="leave this layer out, or bring it to plain form",
            )
        dim_head = attn.inner_dim // attn.heads
        to_out: Any = attn.to_out
        bias, scale = attn.to_q.bias is not None, attn.scale
        sha = cls(attn.query_dim, attn.cross_attention_dim, attn.heads, dim_head, bias, scale, to_out, device="meta")
        for name in ("to_q", "to_k", "to_v"):
            linear = getattr(attn, name)
            for i, conv in enumerate(getattr(sha, f"{name}_convs")):
                rows = slice(i * dim_head, (i + 1) * dim_head)
                conv.weight = _view(linear.weight, linear.weight[rows, :, None, None])
                if bias:
                    conv.bias = _view(linear.bias, linear.bias[rows])
        return sha.train(attn.training)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """Attend from `hidden_states` (b, Tq, C) to `encoder_hidden_states` (b, Tk, C') or to itself.

        Raises:
            UnsupportedModelError: A mask or a further argument is given.
        """
        _require_plain_call(attention_mask, cross_attention_kwargs)
        image = hidden_states.transpose(1, 2).unsqueeze(2)
        context = image if encoder_hidden_states is None else encoder_hidden_states.transpose(1, 2).unsqueeze(2)
        outputs = []
        for to_q, to_k, to_v in zip(self.to_q_convs, self.to_k_convs, self.to_v_convs, strict=True):
            query = to_q(image).permute(0, 2, 3, 1)
            key = to_k(context).permute(0, 2, 1, 3)
            value = to_v(context).permute(0, 2, 3, 1)
            # Scaling q, not the scores, keeps one op off the largest tensor: 3 s of 3.5 per head in the simulator.
            outputs.append(torch.softmax(query * self.scale @ key, dim=-1) @ value)
        output = torch.cat(outputs, dim=-1).squeeze(1)
        for module in self.to_out:
            output = module(output)
        return output


def _view(parameter: nn.Parameter, part: Tensor) -> nn.Parameter:
    return nn.Parameter(part.detach(), requires_grad=parameter.requires_grad)


def _require_plain_call(attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    given = [*(["attention_mask"] if attention_mask is not None else []), *kwargs]
    if given:
        raise UnsupportedModelError(
            f"attention in explicit form takes no {', '.join(given)}", hint="call the model without it"
        )


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
        self.attention = SHAAttention.from_attention(layer)

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
        reasons = {match.path: unsupported_reason(_attention(match)) for match in matches}
        if refused := [f"`{path}`: {reason}" for path, reason in reasons.items() if reason]:
            raise UnsupportedModelError(
                f"{len(refused)} of {len(matches)} attentions of {type(model).__name__} cannot be rewritten per head:\n"
                + "\n".join(refused),
                hint="bring them to plain form, or leave them out with exclude_key=",
            )
        return matches


def _attention(match: LayerMatch) -> Any:
    return unwrap(match.module)
