"""Attention as the HTP wants it: one small graph per head (SHA) instead of one batched over heads (MHA).

MHA and SHA are the same sum: head i of a projection is rows i*d to (i+1)*d of its matrix, and a 1x1 convolution over
(b, C, 1, T) is a matrix product at each token. So the heads' weights are bit-equal slices.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sdconvert.errors import UnsupportedModelError
from sdconvert.models.attention_steps import (
    Scores,
    as_image,
    finished,
    finished_image,
    normalized_context,
    normalized_image,
    padded_mask,
    require_image,
    require_plain_call,
)
from sdconvert.models.per_head import KeyValue, attend_per_head, fold_into

KEPT = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "to_out")
"""Submodules of diffusers' `Attention` that SHA keeps as they are, under their names."""


class SHAAttention(nn.Module):
    """Attention with 1x1 convolutions and separate products for each head.

        hidden (b, Tq, C)            context (b, Tk, C')        each may be an image (b, C, h, w)
           | unsqueeze, permute         | unsqueeze, permute    instead: put in one row
           | [group_norm]               | [norm_cross before]
        (b, C, 1, Tq)                (b, C', 1, Tk)
           |                            |------------------.
        to_q_convs.i                 to_k_convs.j       to_v_convs.j          for each head i; j = i, or less if
        (b, d, 1, Tq)                (b, d, 1, Tk)      (b, d, 1, Tk)         heads share keys and values
           | [norm_q]                   | [norm_k]         |
           | * scale (b, 1, Tq, d)      | (b, 1, d, Tk)    | (b, 1, Tk, d)
           '--------- MatMul -----------'                  |
                 [+ mask]  Softmax (b, 1, Tq, Tk)          |
                        '------------- MatMul -------------'
                                  (b, 1, Tq, d)
        Concat over heads (b, 1, Tq, heads * d) -> squeeze -> [to_out] (b, Tq, C) -> [+ input] -> [/ factor]
                                    for an image: permute -> [to_out] (b, C, 1, Tq) -> in rows of the image …

    `sdconvert.models.attention_processors` judges which layers this is the same as, and makes it of them.

    Args:
        attn: The layer in MHA form, whose norms and `to_out` become this one's too.
        projections: Convolutions per head by the projection's name: `to_q`, `to_k`, `to_v`.
        scores: How queries and keys become probabilities.
    """

    takes_images = True
    to_q_convs: nn.ModuleList
    to_k_convs: nn.ModuleList
    to_v_convs: nn.ModuleList
    group_norm: nn.Module | None
    norm_q: nn.Module | None
    norm_k: nn.Module | None

    def __init__(self, attn: Any, projections: Mapping[str, nn.ModuleList], scores: Scores) -> None:
        super().__init__()
        self.heads = len(projections["to_q"])
        self.scores = scores
        self.residual_connection: bool = attn.residual_connection
        self.rescale_output_factor: float = attn.rescale_output_factor
        *norms, to_out = KEPT
        for name in norms:
            setattr(self, name, getattr(attn, name))
        for name, convs in projections.items():
            self.add_module(f"{name}_convs", convs)
        setattr(self, to_out, getattr(attn, to_out))
        self.train(attn.training)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """Attend from `hidden_states` (b, Tq, C) or (b, C, h, w) to `encoder_hidden_states` (b, Tk, C') or to itself.

        Args:
            hidden_states: What attends.
            encoder_hidden_states: What is looked at; it may be an image (b, C', h, w) too.
            attention_mask: Bias (b, 1 or Tq, Tk) of the scores.
            temb: For a `spatial_norm`; without one it has no effect, as in diffusers.
            cross_attention_kwargs: None are taken.

        Raises:
            UnsupportedModelError: The mask is no such bias, or there is a further argument.
        """
        require_plain_call(hidden_states, attention_mask, cross_attention_kwargs)
        image, sources, mask = self._sources(hidden_states, encoder_hidden_states, attention_mask, temb)
        rows = attend_per_head(image, self.to_q_convs, sources, self.scores, mask, (self.norm_q, self.norm_k))
        if hidden_states.ndim == 4:
            return finished_image(self, rows, hidden_states)
        return finished(self, rows.squeeze(1), hidden_states)

    def _sources(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None, mask: Tensor | None, temb: Tensor | None
    ) -> tuple[Tensor, list[KeyValue], Tensor | None]:
        """What attends (b, C, 1, Tq), where keys and values come from, and the mask of all of these."""
        image = as_image(normalized_image(self, hidden_states, temb))
        if self.group_norm is not None:
            image = self.group_norm(image)
        context = image
        if encoder_hidden_states is not None:
            context = as_image(normalized_context(self, encoder_hidden_states))
        return image, [(self.to_k_convs, self.to_v_convs, context)], mask

    def fold_scale(self) -> dict[str, float]:
        """Multiply the scale into weights and biases of `to_q_convs`, and drop the multiplication.

        Returns:
            Factor of every parameter that was multiplied, by its name here.

        Raises:
            UnsupportedModelError: The scale is folded already, or queries are normalized after the projection.
        """
        if self.norm_q is not None:
            raise UnsupportedModelError(
                "the attention's scale cannot go into to_q: qk_norm would take it out again",
                hint="leave this layer's scale where it is",
            )
        factors = fold_into(self.to_q_convs, self.scores.scale)
        self.scores = self.scores.folded()
        return {f"to_q_convs.{name}": factor for name, factor in factors.items()}


class SHAAddedKVAttention(SHAAttention):
    """Attention of an image (b, C, h, w) to text and to itself, each with keys and values of its own.

    As diffusers' `AttnAddedKVProcessor`: the text's keys and values come first, `group_norm` is for the image only, and
    the input is added to the output.

    Args:
        attn: As of `SHAAttention`.
        projections: Also `add_k_proj` and `add_v_proj`; without `to_k` and `to_v` only the text is looked at.
        scores: As of `SHAAttention`.
    """

    group_norm: nn.Module
    add_k_proj_convs: nn.ModuleList
    add_v_proj_convs: nn.ModuleList

    def __init__(self, attn: Any, projections: Mapping[str, nn.ModuleList], scores: Scores) -> None:
        super().__init__(attn, projections, scores)
        self.residual_connection, self.rescale_output_factor = True, 1.0

    def _sources(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None, mask: Tensor | None, temb: Tensor | None
    ) -> tuple[Tensor, list[KeyValue], Tensor | None]:
        """The mask, which is for the text, hides nothing of the image."""
        require_image(hidden_states)
        image = as_image(hidden_states)
        context = image
        if encoder_hidden_states is not None:
            context = as_image(normalized_context(self, encoder_hidden_states))
        image = self.group_norm(image)
        sources: list[KeyValue] = [(self.add_k_proj_convs, self.add_v_proj_convs, context)]
        if "to_k_convs" in self._modules:
            sources.append((self.to_k_convs, self.to_v_convs, image))
        keys = sum(source.shape[-1] for _, _, source in sources)
        return image, sources, padded_mask(mask, context.shape[-1], keys)
