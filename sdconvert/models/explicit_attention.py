"""Multi-head attention written out as MatMul, Softmax, MatMul: what a traced graph is to show.

diffusers' own processors trace to a fused kernel, or to a `baddbmm` on an uninitialised tensor.
"""

from typing import ClassVar

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from sdconvert.models.attention_steps import (
    Scores,
    as_tokens,
    finished,
    normalized_context,
    normalized_image,
    padded_mask,
    projected_out,
    require_image,
    require_plain_call,
)

Projected = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Queries, keys and values (b, tokens, channels), and the mask of all keys."""


class ExplicitAttnProcessor:
    """A processor for diffusers' `Attention`.

    Args:
        scores: How queries and keys become probabilities; None: as the layer itself says.
    """

    images_only: ClassVar[bool] = False
    """Whether it takes (b, c, h, w) only."""

    def __init__(self, scores: Scores | None = None) -> None:
        self.scores = scores

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend from `hidden_states` (b, tokens, c) or (b, c, h, w) to `encoder_hidden_states` or to itself.

        `attention_mask` (b, 1 or tokens, context tokens) is added to the scores.

        Raises:
            UnsupportedModelError: The mask is no such bias.
        """
        require_plain_call(hidden_states, attention_mask, {})
        if self.images_only:
            require_image(hidden_states)
        image = normalized_image(attn, hidden_states, temb)
        context = None if encoder_hidden_states is None else normalized_context(attn, encoder_hidden_states)
        query, key, value, mask = self._project(attn, as_tokens(image), context, attention_mask)
        return self._finish(attn, self._attend(attn, query, key, value, mask), hidden_states)

    def _project(self, attn: Attention, tokens: Tensor, context: Tensor | None, mask: Tensor | None) -> Projected:
        """Queries of the tokens (b, Tq, c), keys and values of the context (b, Tk, c') or of the tokens."""
        tokens = _group_normalized(attn, tokens)
        context = tokens if context is None else context
        return attn.to_q(tokens), attn.to_k(context), attn.to_v(context), mask

    def _finish(self, attn: Attention, tokens: Tensor, residual: Tensor) -> Tensor:
        """What follows the heads."""
        return finished(attn, tokens, residual)

    def _attend(self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of all heads at once; (b, tokens, heads or fewer * d) in, (b, Tq, heads * d) out."""
        scores = self.scores or scores_of(attn)
        batch, tokens, width = query.shape
        dim_head = width // attn.heads
        query = split_heads(query, attn.heads)
        key, value = (_repeated(split_heads(one, one.shape[-1] // dim_head), attn.heads) for one in (key, value))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        probabilities = scores.probabilities(query, key.transpose(-1, -2), mask)
        # (b, heads, tokens, d) -> (b, tokens, heads * d)
        output: Tensor = (probabilities @ value).transpose(1, 2).reshape(batch, tokens, -1)
        return output


class ExplicitFusedAttnProcessor(ExplicitAttnProcessor):
    """The same for a layer with one matrix for q, k and v, or for k and v."""

    def _project(self, attn: Attention, tokens: Tensor, context: Tensor | None, mask: Tensor | None) -> Projected:
        tokens = _group_normalized(attn, tokens)
        if context is None:
            query, key, value = attn.to_qkv(tokens).chunk(3, dim=-1)
            return query, key, value, mask
        key, value = attn.to_kv(context).chunk(2, dim=-1)
        return attn.to_q(tokens), key, value, mask


class ExplicitAttnAddedKVProcessor(ExplicitAttnProcessor):
    """The same for a layer that attends to text, through projections of its own, and to its input (b, c, h, w).

    A mask is for the text.
    """

    images_only = True

    def _project(self, attn: Attention, tokens: Tensor, context: Tensor | None, mask: Tensor | None) -> Projected:
        context = tokens if context is None else context
        tokens = _group_normalized(attn, tokens)
        key, value = attn.add_k_proj(context), attn.add_v_proj(context)
        if not attn.only_cross_attention:
            key = torch.cat([key, attn.to_k(tokens)], dim=1)
            value = torch.cat([value, attn.to_v(tokens)], dim=1)
        return attn.to_q(tokens), key, value, padded_mask(mask, context.shape[1], key.shape[1])

    def _finish(self, attn: Attention, tokens: Tensor, residual: Tensor) -> Tensor:
        return projected_out(attn, tokens, residual) + residual


def scores_of(attn: Attention) -> Scores:
    """How a layer itself says that queries and keys become probabilities."""
    return Scores(attn.scale, attn.upcast_attention, attn.upcast_softmax)


def _group_normalized(attn: Attention, tokens: Tensor) -> Tensor:
    if attn.group_norm is None:
        return tokens
    normalized: Tensor = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
    return normalized


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(b, tokens, heads * d) -> (b, heads, tokens, d)."""
    return tokens.reshape(*tokens.shape[:-1], heads, -1).transpose(1, 2)


def _repeated(tensor: Tensor, heads: int) -> Tensor:
    """(b, fewer heads, tokens, d) -> (b, heads, tokens, d): as many heads in a row share one."""
    fewer = tensor.shape[1]
    if fewer == heads:
        return tensor
    return tensor.unsqueeze(2).expand(-1, -1, heads // fewer, -1, -1).flatten(1, 2)
