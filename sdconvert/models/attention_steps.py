"""The steps of attention that its form per head (SHA) and its form over all heads (MHA) have in common.

Each step reads the layer's own attributes, by the names of diffusers' `Attention`, so that both forms take it.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sdconvert.errors import UnsupportedModelError
from sdconvert.models.image_layout import image_to_tokens, in_one_row, in_rows, tokens_to_image

HIDDEN = -100.0
"""What hides a token when it is added to its scores: beside them exp(-100) is nothing, and the mask itself still has
500 steps of a 16-bit grid between 0 and 1."""
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Scores:
    """How queries and keys become probabilities.

    Args:
        scale: Of the queries; None where the weights of `to_q` hold it already.
        upcast_attention: Whether half-precision queries and keys are multiplied in float32.
        upcast_softmax: Whether the softmax of half-precision scores is computed in float32.
    """

    scale: float | None
    upcast_attention: bool = False
    upcast_softmax: bool = False

    def folded(self) -> "Scores":
        """The same for queries that are scaled already."""
        return replace(self, scale=None)

    def probabilities(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax of q k^T + mask.

        Args:
            query: (b, heads, Tq, d).
            key: (b, heads, d, Tk).
            mask: Bias (b or 1, 1 or Tq, Tk) of the scores, for all heads.
        """
        dtype = query.dtype
        if self.upcast_attention and dtype in _HALF:
            query, key = query.float(), key.float()
        # Scaling q, not the scores, keeps one op off the largest tensor: 3 s of 3.5 per head in the simulator.
        scores = (query if self.scale is None else query * self.scale) @ key
        if mask is not None:
            scores = scores + mask.unsqueeze(1)
        if self.upcast_softmax and dtype in _HALF:
            scores = scores.float()
        probabilities = torch.softmax(scores, dim=-1)
        return probabilities if probabilities.dtype == dtype else probabilities.to(dtype)


def as_tokens(hidden_states: Tensor) -> Tensor:
    """(b, c, h, w) or (b, tokens, c) -> (b, tokens, c)."""
    return hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states


def as_image(hidden_states: Tensor) -> Tensor:
    """(b, c, h, w) or (b, tokens, c) -> (b, c, 1, tokens), what a 1x1 convolution takes."""
    return in_one_row(hidden_states) if hidden_states.ndim == 4 else tokens_to_image(hidden_states)


def normalized_image(attn: Any, hidden_states: Tensor, temb: Tensor | None) -> Tensor:
    """Apply a layer's `spatial_norm`, which needs `temb` (b, c, h, w), if it has one."""
    if attn.spatial_norm is None:
        return hidden_states
    if temb is None or hidden_states.ndim != 4:
        raise UnsupportedModelError(
            f"attention with a spatial_norm takes an image (b, c, h, w) and temb, not a {hidden_states.ndim}-D input "
            f"and {'no temb' if temb is None else 'temb'}",
            hint="give both, as the decoder of a VQModel does",
        )
    normalized: Tensor = attn.spatial_norm(hidden_states, temb)
    return normalized


def normalized_context(attn: Any, encoder_hidden_states: Tensor) -> Tensor:
    """Apply a layer's `norm_cross`, if it has one, to (b, tokens, c) or (b, c, h, w); (b, tokens, c) comes out."""
    if attn.norm_cross is None:
        return encoder_hidden_states
    tokens = as_tokens(encoder_hidden_states)
    channels_first = isinstance(attn.norm_cross, nn.GroupNorm)
    normalized: Tensor = attn.norm_cross(tokens.transpose(1, 2) if channels_first else tokens)
    return normalized.transpose(1, 2) if channels_first else normalized


def projected_out(attn: Any, tokens: Tensor, like: Tensor) -> Tensor:
    """Apply a layer's `to_out`, if it has one, to (b, Tq, heads * d), and take the form of its input `like`."""
    for module in attn.to_out or ():
        tokens = _on_tokens(module, tokens)
    return tokens.transpose(1, 2).reshape(like.shape) if like.ndim == 4 else tokens


def finished(attn: Any, tokens: Tensor, residual: Tensor) -> Tensor:
    """What follows the heads: `to_out`, the layer's input, the rescaling.

    Args:
        attn: The layer.
        tokens: (b, Tq, heads * d).
        residual: The layer's input, (b, c, h, w) or (b, tokens, c).
    """
    return _with_input(attn, projected_out(attn, tokens, residual), residual)


def finished_image(attn: Any, rows: Tensor, residual: Tensor) -> Tensor:
    """The same for an image, with no step over tokens where `to_out` is a convolution.

    Args:
        attn: The layer.
        rows: (b, 1, Tq, heads * d).
        residual: The layer's input, (b, c, h, w).
    """
    modules = list(attn.to_out or ())
    if modules and not isinstance(modules[0], nn.Conv2d):
        rows = modules.pop(0)(rows.squeeze(1)).unsqueeze(1)
    image = rows.permute(0, 3, 1, 2)
    for module in modules:
        image = module(image)
    return _with_input(attn, in_rows(image, residual.shape[2]), residual)


def _with_input(attn: Any, output: Tensor, residual: Tensor) -> Tensor:
    if attn.residual_connection:
        output = output + residual
    return output if attn.rescale_output_factor == 1 else output / attn.rescale_output_factor


def padded_mask(mask: Tensor | None, tokens: int, keys: int) -> Tensor | None:
    """A mask of a text's tokens, which stand first, that hides none of the tokens behind them.

    Args:
        mask: Bias (b or 1, 1, `tokens`).
        tokens: Of the text.
        keys: Of the text and of what follows it.

    Raises:
        UnsupportedModelError: The mask is for another number of tokens.
    """
    if mask is None:
        return None
    if mask.shape[-1] != tokens:
        raise UnsupportedModelError(
            f"the attention_mask is for {mask.shape[-1]} tokens, and the text has {tokens}",
            hint="give a mask of the text alone",
        )
    return nn.functional.pad(mask, (0, keys - tokens))


def require_image(hidden_states: Tensor) -> None:
    """Refuse tokens where an image is taken.

    Raises:
        UnsupportedModelError: The input is not 4-D.
    """
    if hidden_states.ndim != 4:
        raise UnsupportedModelError(
            f"attention with added keys and values takes an image (b, c, h, w), and got a {hidden_states.ndim}-D input",
            hint="call the layer as diffusers' UNet blocks do",
        )


def _on_tokens(module: nn.Module, tokens: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d):
        return image_to_tokens(module(tokens_to_image(tokens)))
    output: Tensor = module(tokens)
    return output


def require_plain_call(hidden_states: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Refuse arguments of an attention's call that the explicit forms have no place for; None asks for nothing.

    Raises:
        UnsupportedModelError: There are any, or the mask is no bias (b, 1 or queries, context tokens).
    """
    if asked := sorted(name for name, value in kwargs.items() if value is not None):
        raise UnsupportedModelError(
            f"attention in explicit form takes no {', '.join(asked)}", hint="call the model without it"
        )
    if attention_mask is None:
        return
    batch, queries = hidden_states.shape[0], hidden_states.shape[2:].numel()
    queries = hidden_states.shape[1] if hidden_states.ndim == 3 else queries
    fits = (
        attention_mask.ndim == 3
        and attention_mask.is_floating_point()
        and attention_mask.shape[0] in (1, batch)
        and attention_mask.shape[1] in (1, queries)
    )
    if not fits:
        raise UnsupportedModelError(
            f"attention in explicit form takes an attention_mask (b, 1, tokens) of floats, not "
            f"{attention_mask.dtype} {tuple(attention_mask.shape)}",
            hint="give a bias that is added to the scores: 0 keeps a token, -10000 hides it",
        )
