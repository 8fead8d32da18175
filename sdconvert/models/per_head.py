"""What attention per head is made of: slices of projections as 1x1 convolutions, and the products of each head."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from sdconvert.errors import UnsupportedModelError
from sdconvert.models.attention_steps import Scores

KeyValue = tuple[nn.ModuleList, nn.ModuleList, Tensor]
"""Convolutions to k and to v, one per head, and the image (b, C', 1, Tk) that both take."""


def attend_per_head(
    image: Tensor,
    to_q_convs: nn.ModuleList,
    sources: Sequence[KeyValue],
    scores: Scores,
    mask: Tensor | None,
    norms: tuple[nn.Module | None, nn.Module | None] = (None, None),
) -> Tensor:
    """Attention, head by head.

    Args:
        image: What attends, (b, C, 1, Tq).
        to_q_convs: One convolution per head.
        sources: Where keys and values come from; those of several sources stand one after the other. Where they have
            fewer convolutions, as many heads in a row share one.
        scores: How queries and keys become probabilities.
        mask: Bias (b or 1, 1 or Tq, Tk).
        norms: Of each head's queries and keys, over their last dimension d.

    Returns:
        (b, 1, Tq, heads * d).
    """
    norm_q, norm_k = norms
    shared = len(to_q_convs) // len(sources[0][0])
    outputs, key, value = [], image, image
    for head, to_q in enumerate(to_q_convs):
        query = to_q(image).permute(0, 2, 3, 1)
        if norm_q is not None:
            query = norm_q(query)
        if head % shared == 0:
            one = head // shared
            key = _joined([to_k[one](context) for to_k, _, context in sources])
            value = _joined([to_v[one](context) for _, to_v, context in sources]).permute(0, 2, 3, 1)
            key = key.permute(0, 2, 1, 3) if norm_k is None else norm_k(key.permute(0, 2, 3, 1)).transpose(-1, -2)
        outputs.append(scores.probabilities(query, key, mask) @ value)
    return torch.cat(outputs, dim=-1)


def reasons_against_cutting(name: str, linear: nn.Module) -> Iterator[str]:
    """Why slices of a projection's weight would lose what else the projection is."""
    if type(linear) is not nn.Linear:
        yield f"its {name} is a {type(linear).__name__}, not a Linear"
    elif linear._forward_hooks or linear._forward_pre_hooks:
        yield f"its {name} carries a hook or a plugin; fuse or remove it first"


def head_convs(linear: nn.Linear, rows: range, dim_head: int) -> nn.ModuleList:
    """Cut rows of a projection into 1x1 convolutions.

    Args:
        linear: The projection.
        rows: Those that belong together, all or some.
        dim_head: Rows of one head.

    Returns:
        One convolution per head, whose weight (d, C, 1, 1) and bias (d,) are views of the projection's.
    """
    convs = []
    for start in rows[::dim_head]:
        part = slice(start, start + dim_head)
        conv = nn.Conv2d(linear.in_features, dim_head, 1, bias=linear.bias is not None, device="meta")
        conv.weight = _view(linear.weight, linear.weight[part, :, None, None])
        if linear.bias is not None:
            conv.bias = _view(linear.bias, linear.bias[part])
        convs.append(conv)
    return nn.ModuleList(convs)


def fold_into(to_q_convs: nn.ModuleList, scale: float | None) -> dict[str, float]:
    """Multiply a scale into all parameters of projections; returns the factor of each.

    Raises:
        UnsupportedModelError: There is no scale: it is in the weights already.
    """
    if scale is None:
        raise UnsupportedModelError("the attention's scale is in the weights of to_q already", hint="fold it once only")
    for parameter in to_q_convs.parameters():
        # A new tensor: the old one is a view of the MHA form's weight.
        parameter.data = parameter.data * scale
    return {name: scale for name, _ in to_q_convs.named_parameters()}


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """(b, d, 1, tokens) of all sources, one after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=3)


def _view(parameter: Tensor, part: Tensor) -> nn.Parameter:
    return nn.Parameter(part.detach(), requires_grad=parameter.requires_grad)
