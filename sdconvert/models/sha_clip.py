"""The attention of transformers' CLIP, per head."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPAttention

from sdconvert.models.attention_steps import HIDDEN, Scores, as_image
from sdconvert.models.per_head import attend_per_head, fold_into, head_convs, reasons_against_cutting

PROJECTIONS = ("k_proj", "v_proj", "q_proj")


class SHACLIPAttention(nn.Module):
    """CLIP's attention with 1x1 convolutions `{q,k,v}_proj_convs.i` and separate products for each head.

    Args:
        attn: The layer in MHA form, whose `out_proj` becomes this one's too.
    """

    q_proj_convs: nn.ModuleList
    k_proj_convs: nn.ModuleList
    v_proj_convs: nn.ModuleList

    def __init__(self, attn: CLIPAttention) -> None:
        super().__init__()
        self.heads = attn.num_heads
        self.scores = Scores(attn.scale)
        for name in PROJECTIONS:
            linear: nn.Linear = getattr(attn, name)
            self.add_module(f"{name}_convs", head_convs(linear, range(linear.out_features), attn.head_dim))
        self.out_proj = attn.out_proj
        # The longest text; forward takes a corner of it.
        longest = getattr(attn.config, "max_position_embeddings", 0)
        hidden = torch.full((1, longest, longest), HIDDEN, device=attn.out_proj.weight.device).triu(1)
        self.register_buffer("hidden_ahead", hidden, persistent=False)
        self.train(attn.training)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `hidden_states` (b, tokens, c) to itself.

        Args:
            hidden_states: The tokens.
            attention_mask: Bias (b, 1, tokens, tokens), or where it is bool, whether to look.
            kwargs: Of transformers; `is_causal` hides what is ahead, unless a mask does.

        Returns:
            The output (b, tokens, c); no probabilities.
        """
        image = as_image(hidden_states)
        mask = None if attention_mask is None else attention_mask[:, 0]
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=hidden_states.dtype).masked_fill(~mask, HIDDEN)
        # Newer versions of transformers say that the mask is causal, older ones give it.
        if mask is None and (kwargs.get("is_causal") or kwargs.get("causal_attention_mask") is not None):
            tokens = hidden_states.shape[1]
            hidden_ahead: Any = self.hidden_ahead
            mask = hidden_ahead[:, :tokens, :tokens]
        output = attend_per_head(
            image, self.q_proj_convs, [(self.k_proj_convs, self.v_proj_convs, image)], self.scores, mask
        )
        return self.out_proj(output.squeeze(1)), None

    def fold_scale(self) -> dict[str, float]:
        """See `SHAAttention.fold_scale`."""
        factors = fold_into(self.q_proj_convs, self.scores.scale)
        self.scores = self.scores.folded()
        return {f"q_proj_convs.{name}": factor for name, factor in factors.items()}


def reason_against_clip(attn: CLIPAttention) -> str | None:
    """Why a layer cannot be written per head, or None if it can."""
    if type(attn).forward is not CLIPAttention.forward:
        return f"its class {type(attn).__name__} has a forward of its own"
    reasons = (reason for name in PROJECTIONS for reason in reasons_against_cutting(name, getattr(attn, name)))
    return next(reasons, None)
