"""diffusers' processors that compute softmax(q k^T) v, and what each of them makes of a layer's options.

They differ in what they leave out without a word, and in which scale they take; a rewrite computes what the processor
computes, and a layer with an option that its processor leaves out is refused.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import diffusers.models.attention_processor as of_diffusers
from diffusers.models.attention_processor import Attention

from sdconvert.models.attention_rewrite import AttentionProcessorRegistry, AttentionRewrite
from sdconvert.models.attention_steps import Scores
from sdconvert.models.explicit_attention import (
    ExplicitAttnAddedKVProcessor,
    ExplicitAttnProcessor,
    ExplicitFusedAttnProcessor,
    scores_of,
)
from sdconvert.models.per_head import head_convs, reasons_against_cutting
from sdconvert.models.sha import SHAAddedKVAttention, SHAAttention


class Projection(NamedTuple):
    """Rows of a matrix that project to queries, keys or values."""

    linear: Any
    rows: range


@AttentionProcessorRegistry.register(of_diffusers.AttnProcessor)
class PlainAttention(AttentionRewrite):
    """Softmax(q k^T) v by single ops; subclasses say what other processors do otherwise."""

    ignores: ClassVar[tuple[str, ...]] = ("norm_q", "norm_k", "added_kv_proj_dim")
    """Options of a layer that the processor leaves out: a layer that has one of them is not what it seems."""
    upcasts: ClassVar[bool] = True
    """Whether it obeys `upcast_attention` and `upcast_softmax`."""
    own_scale: ClassVar[bool] = False
    """Whether it scales by 1 / sqrt(d), whatever the layer says."""
    shares_heads: ClassVar[bool] = False
    """Whether it takes fewer heads for keys and values than for queries."""
    explicit: ClassVar[type[ExplicitAttnProcessor]] = ExplicitAttnProcessor
    sha: ClassVar[type[SHAAttention]] = SHAAttention

    def projections(self) -> dict[str, Projection]:
        """The matrix rows of each projection, by the projection's name."""
        attn = self.attn
        return {name: _all_rows(getattr(attn, name)) for name in ("to_q", "to_k", "to_v")}

    @property
    def dim_head(self) -> int:
        """Channels of one head."""
        return int(self.attn.inner_dim) // int(self.attn.heads)

    def scores(self) -> Scores:
        """How queries and keys become probabilities."""
        own = scores_of(self.attn)
        scale = self.dim_head**-0.5 if self.own_scale else own.scale
        return replace(own, scale=scale) if self.upcasts else Scores(scale)

    def reason_against_graph(self) -> str | None:
        """See `AttentionRewrite.reason_against_graph`."""
        return next(self._reasons_against_graph(), None)

    def _reasons_against_graph(self) -> Iterator[str]:
        attn, processor = self.attn, type(self.attn.processor).__name__
        for option in self.ignores:
            if getattr(attn, option) is not None:
                yield f"it has {_OPTIONS[option]}, which its processor {processor} has no place for"
        projections = self.projections()
        if missing := [name for name, (linear, _) in projections.items() if linear is None]:
            yield f"it has no {missing[0]}, which its processor {processor} needs"
        rows = {name: len(one.rows) for name, one in projections.items()}
        # A projection that is more than a matrix has no rows to count; it can be traced, not cut.
        if all(rows.values()):
            yield from self._reasons_against_rows(rows.pop("to_q"), sorted(set(rows.values())))
        for name in ("norm_q", "norm_k"):
            if _width(getattr(attn, name)) not in (None, self.dim_head):
                yield f"it normalizes across heads (qk_norm): {name} needs all {attn.heads} heads at once"

    def _reasons_against_rows(self, rows: int, others: list[int]) -> Iterator[str]:
        heads, dim_head = self.attn.heads, self.dim_head
        if rows != heads * dim_head or any(one % dim_head or rows % one for one in others):
            yield f"its projections of {rows} and {others} rows are no multiples of {heads} heads of {dim_head} rows"
        elif len(others) > 1:
            yield f"its projections to keys and values have different numbers of rows: {others}"
        elif others != [rows] and not self.shares_heads:
            processor = type(self.attn.processor).__name__
            yield f"it has fewer heads for keys and values than for queries, which {processor} cannot compute"

    def reason_against_heads(self) -> str | None:
        """See `AttentionRewrite.reason_against_heads`."""
        return self.reason_against_graph() or next(self._reasons_against_heads(), None)

    def _reasons_against_heads(self) -> Iterator[str]:
        attn = self.attn
        if type(attn).forward is not Attention.forward:
            yield f"its class {type(attn).__name__} has a forward of its own"
        for name, (linear, _) in self.projections().items():
            yield from reasons_against_cutting(name, linear)

    def explicit_processor(self) -> ExplicitAttnProcessor:
        """See `AttentionRewrite.explicit_processor`."""
        return self.explicit(self.scores())

    def per_head(self) -> SHAAttention:
        """See `AttentionRewrite.per_head`."""
        dim_head = self.dim_head
        convs = {name: head_convs(linear, rows, dim_head) for name, (linear, rows) in self.projections().items()}
        return self.sha(self.attn, convs, self.scores())


@AttentionProcessorRegistry.register(of_diffusers.SlicedAttnProcessor)
class SlicedAttention(PlainAttention):
    """Computes some heads at a time."""

    ignores = (*PlainAttention.ignores, "spatial_norm")


@AttentionProcessorRegistry.register(of_diffusers.XFormersAttnProcessor)
class XFormersAttention(PlainAttention):
    """A fused kernel, with the layer's own scale."""

    upcasts = False


@AttentionProcessorRegistry.register(of_diffusers.AttnProcessor2_0)
class ScaledDotProductAttention(PlainAttention):
    """A fused kernel of torch, which has its own scale."""

    ignores: ClassVar[tuple[str, ...]] = ("added_kv_proj_dim",)
    upcasts, own_scale = False, True


@AttentionProcessorRegistry.register(of_diffusers.StableAudioAttnProcessor2_0)
class GroupedAttention(ScaledDotProductAttention):
    """Several heads share keys and values. Calls with a rotary embedding are refused when they are made."""

    ignores = ("added_kv_proj_dim", "group_norm", "spatial_norm")
    shares_heads = True


@AttentionProcessorRegistry.register(ExplicitAttnProcessor)
class ExplicitAttention(PlainAttention):
    """Written out already, with all options."""

    ignores = ("added_kv_proj_dim",)
    shares_heads = True

    def scores(self) -> Scores:
        """See `PlainAttention.scores`."""
        processor: Any = self.attn.processor
        return processor.scores or scores_of(self.attn)


@AttentionProcessorRegistry.register(of_diffusers.FusedAttnProcessor2_0)
class FusedAttention(ScaledDotProductAttention):
    """One matrix for q, k and v, or for k and v; `to_q`, `to_k` and `to_v`, where still there, are not looked at."""

    explicit = ExplicitFusedAttnProcessor

    def projections(self) -> dict[str, Projection]:
        """See `PlainAttention.projections`."""
        attn: Any = self.attn
        if attn.is_cross_attention:
            keys, values = _parts(attn.to_kv, 2)
            return {"to_q": _all_rows(attn.to_q), "to_k": keys, "to_v": values}
        return dict(zip(("to_q", "to_k", "to_v"), _parts(attn.to_qkv, 3), strict=True))

    def _reasons_against_graph(self) -> Iterator[str]:
        fused = "to_kv" if self.attn.is_cross_attention else "to_qkv"
        if hasattr(self.attn, fused):
            yield from super()._reasons_against_graph()
        else:
            yield f"it has no {fused}, which its processor {type(self.attn.processor).__name__} needs"


@AttentionProcessorRegistry.register(ExplicitFusedAttnProcessor)
class ExplicitFusedAttention(FusedAttention):
    """Written out already."""

    scores = ExplicitAttention.scores


@AttentionProcessorRegistry.register(of_diffusers.AttnAddedKVProcessor)
@AttentionProcessorRegistry.register(of_diffusers.SlicedAttnAddedKVProcessor)
class AddedKVAttention(PlainAttention):
    """Keys and values of a text are put before the image's own."""

    ignores = ("norm_q", "norm_k", "spatial_norm")
    explicit, sha = ExplicitAttnAddedKVProcessor, SHAAddedKVAttention

    def projections(self) -> dict[str, Projection]:
        """See `PlainAttention.projections`."""
        attn = self.attn
        own = ("to_q",) if attn.only_cross_attention else ("to_q", "to_k", "to_v")
        return {name: _all_rows(getattr(attn, name)) for name in (*own, "add_k_proj", "add_v_proj")}

    def _reasons_against_graph(self) -> Iterator[str]:
        yield from super()._reasons_against_graph()
        if self.attn.group_norm is None:
            yield f"it has no group_norm, which its processor {type(self.attn.processor).__name__} needs"


@AttentionProcessorRegistry.register(of_diffusers.XFormersAttnAddedKVProcessor)
class XFormersAddedKVAttention(AddedKVAttention):
    """The same by a fused kernel, with the layer's own scale."""

    upcasts = False


@AttentionProcessorRegistry.register(of_diffusers.AttnAddedKVProcessor2_0)
class ScaledDotProductAddedKVAttention(XFormersAddedKVAttention):
    """The same by a fused kernel of torch, which has its own scale."""

    own_scale = True


@AttentionProcessorRegistry.register(ExplicitAttnAddedKVProcessor)
class ExplicitAddedKVAttention(AddedKVAttention):
    """Written out already."""

    scores = ExplicitAttention.scores


_OPTIONS = {
    "norm_q": "a norm of queries (qk_norm)",
    "norm_k": "a norm of keys (qk_norm)",
    "added_kv_proj_dim": "added key and value projections",
    "group_norm": "a group_norm",
    "spatial_norm": "a spatial_norm",
}


def _all_rows(linear: Any) -> Projection:
    return Projection(linear, range(linear.weight.shape[0] if hasattr(linear, "weight") else 0))


def _parts(linear: Any, count: int) -> list[Projection]:
    rows = len(_all_rows(linear).rows) // count
    return [Projection(linear, range(i * rows, (i + 1) * rows)) for i in range(count)]


def _width(norm: Any) -> int | None:
    """Channels that a norm of queries or keys takes together, or None if it takes any number."""
    shape = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", None)
    return int(shape[-1]) if isinstance(shape, tuple) else None
