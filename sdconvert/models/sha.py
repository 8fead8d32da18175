"""Attention as the HTP wants it: one small graph per head (SHA) instead of one batched over heads (MHA).

MHA and SHA are the same sum: head i of a projection is rows i*d to (i+1)*d of its matrix, and a 1x1 convolution over
(b, C, 1, T) is a matrix product at each token. So the heads' weights are bit-equal slices.
"""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from sdconvert.errors import UnsupportedModelError


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
                 [+ mask]  Softmax (b, 1, Tq, Tk)          |
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
    def from_plain_attention(cls, attn: Attention) -> "SHAAttention":
        """Cut a diffusers attention, which must be plain; weights are views of its weights, and `to_out` is its own.

        `sdconvert.models.attention_processors.rewrite_of` judges what is plain, and calls this.
        """
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

        Args:
            hidden_states: What attends.
            encoder_hidden_states: What is looked at.
            attention_mask: Bias (b, 1, Tk) of the scores.
            cross_attention_kwargs: None are taken.

        Raises:
            UnsupportedModelError: The input is an image (4-D), the mask no such bias, or there is a further argument.
        """
        require_plain_call(attention_mask, cross_attention_kwargs)
        if hidden_states.ndim != 3:
            raise UnsupportedModelError(
                f"attention per head takes tokens (b, tokens, c), and got a {hidden_states.ndim}-D input",
                hint="leave this layer out: attention over images (b, c, h, w) stays as it is",
            )
        image = hidden_states.transpose(1, 2).unsqueeze(2)
        context = image if encoder_hidden_states is None else encoder_hidden_states.transpose(1, 2).unsqueeze(2)
        outputs = []
        for to_q, to_k, to_v in zip(self.to_q_convs, self.to_k_convs, self.to_v_convs, strict=True):
            query = to_q(image).permute(0, 2, 3, 1)
            key = to_k(context).permute(0, 2, 1, 3)
            value = to_v(context).permute(0, 2, 3, 1)
            # Scaling q, not the scores, keeps one op off the largest tensor: 3 s of 3.5 per head in the simulator.
            outputs.append(attention_weights(query * self.scale @ key, attention_mask) @ value)
        output = torch.cat(outputs, dim=-1).squeeze(1)
        for module in self.to_out:
            output = module(output)
        return output


def attention_weights(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of scores (b, heads, Tq, Tk), after adding a mask (b, 1, Tk) if there is one."""
    if mask is not None:
        scores = scores + mask.unsqueeze(1)
    return torch.softmax(scores, dim=-1)


def require_plain_call(attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Refuse arguments of an attention's call that the explicit forms have no place for.

    Raises:
        UnsupportedModelError: There are any, or the mask is no bias (b, 1, Tk).
    """
    if kwargs:
        raise UnsupportedModelError(
            f"attention in explicit form takes no {', '.join(kwargs)}", hint="call the model without it"
        )
    if attention_mask is not None and (attention_mask.ndim != 3 or attention_mask.shape[1] != 1):
        raise UnsupportedModelError(
            f"attention in explicit form takes an attention_mask (b, 1, tokens), not {tuple(attention_mask.shape)}",
            hint="give a bias that is added to the scores: 0 keeps a token, -10000 hides it",
        )


def _view(parameter: nn.Parameter, part: Tensor) -> nn.Parameter:
    return nn.Parameter(part.detach(), requires_grad=parameter.requires_grad)
