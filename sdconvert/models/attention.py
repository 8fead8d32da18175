"""The rewrite of attention per head as a plugin: in place, next to the original, until it is fused."""

import re
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

from diffusers.models.attention_processor import Attention
from torch import nn
from transformers.models.clip.modeling_clip import CLIPAttention

from sdconvert.models.attention_processors import (
    ExplicitAttnProcessor,
    offender_against_heads,
    per_head,
    unsupported_reason,
)
from sdconvert.models.sha import SHAAttention
from sdconvert.plugins import LayerMatch, PatchPluginBlock, PluginGroup
from sdconvert.plugins.base import unwrap
from sdconvert.plugins.replacement import ReplacementContainer
from sdconvert.plugins.selectors import iter_layers
from sdconvert.registry import Offender, refuse_together

__all__ = [
    "AttentionPlan",
    "ExplicitAttnProcessor",
    "SHAAttention",
    "SHAAttentionContainer",
    "SHAAttentionPatch",
    "folded_scales",
    "per_head",
    "plan_attention",
    "unsupported_reason",
]

_PROJECTIONS = ({"to_q", "to_k", "to_v"}, {"to_qkv"}, {"q_proj", "k_proj", "v_proj"})
_LEAVE_OUT = "bring them to plain form, leave them out with exclude_key=, or let them be with skip_unsupported=True"


class AttentionPlan(NamedTuple):
    """What `SHAAttentionPatch` does with the layers of a model that attend."""

    rewrites: list[LayerMatch]
    """Those that it rewrites per head."""
    offenders: list[Offender]
    """Those that it cannot, each with the reason."""


def plan_attention(
    model: nn.Module,
    exclude_key: str | None = None,
    exclude_classes: Iterable[type[nn.Module]] = (),
    fold_scale: bool = False,
) -> AttentionPlan:
    """Judge every layer of a model that attends; nothing is touched.

    Args:
        model: Searched with all its submodules.
        exclude_key: Regular expression; a path in which it is found is skipped, with all below it.
        exclude_classes: Classes that are skipped, with all below them.
        fold_scale: Whether the scale is to go into the weights of the queries.
    """
    excluded = tuple(exclude_classes)

    def skip(path: str, layer: nn.Module) -> bool:
        return isinstance(layer, excluded) or (exclude_key is not None and re.search(exclude_key, path) is not None)

    rewrites: list[LayerMatch] = []
    offenders: list[Offender] = []
    for path, module in iter_layers(model, skip):
        layer: Any = unwrap(module)
        if not _attends(layer) or any(path.startswith(f"{one.path}.") for one in offenders):
            continue
        if offender := _offender(path, layer, fold_scale):
            offenders.append(offender)
        else:
            rewrites.append(LayerMatch(path, module, model=model))
    return AttentionPlan(rewrites, offenders)


def folded_scales(group: PluginGroup) -> dict[str, float]:
    """The parameters that `fold_scale` multiplied, by their key in the model in SHA form, and the factor of each."""
    patches = ((path, patch) for path, patch in group.items() if isinstance(patch, SHAAttentionPatch))
    return {f"{path}.{name}": factor for path, patch in patches for name, factor in patch.factors.items()}


class SHAAttentionContainer(ReplacementContainer):
    """Runs a layer's hooks and its inner patches around either form of attention."""


class SHAAttentionPatch(PatchPluginBlock):
    """The rewrite of an attention per head, in place, next to the original until it is fused.

    The model computes SHA while the patch is attached, MHA inside `with patch.disabled():`, SHA without the original
    after `fuse()`.

    Args:
        name: Of the patch in the layer's container.
        host: The layer.
        fold_scale: Multiply the scale of the scores into the weights of the queries: one multiplication less per head,
            and weights that are no longer the MHA form's.
        kwargs: As of `PatchPluginBlock`.

    Attributes:
        factors: What the attention's parameters were multiplied by, by name; empty without `fold_scale`.

    Raises:
        UnsupportedModelError: The attention is more than the rewrites know; `wrap_model` lists all such layers before
            it touches any.
    """

    container_cls = SHAAttentionContainer
    wrapable_classes: ClassVar = (Attention, CLIPAttention)

    def __init__(self, name: str, host: nn.Module, fold_scale: bool = False, **kwargs: Any) -> None:
        super().__init__(name, host, **kwargs)
        layer: Any = unwrap(host)
        attention: Any = per_head(layer)
        self.factors: dict[str, float] = attention.fold_scale() if fold_scale else {}
        self.attention = attention

    @property
    def replacement(self) -> nn.Module:
        """The attention per head."""
        module: nn.Module = self.attention
        return module

    def patched_module(self) -> nn.Module:
        """The attention per head."""
        return self.replacement

    @classmethod
    def wrap_model(
        cls,
        name: str | int,
        model: nn.Module,
        exclude_key: str | None = None,
        exclude_classes: Iterable[type[nn.Module]] = (),
        *,
        skip_unsupported: bool = False,
        fold_scale: bool = False,
        **kwargs: Any,
    ) -> PluginGroup:
        """Attach to every attention of a model, or to none if one of them cannot be rewritten.

        Args:
            name: Of each patch on its layer.
            model: Searched with all its submodules.
            exclude_key: As of `WrapablePlugin.wrap_model`.
            exclude_classes: As of `WrapablePlugin.wrap_model`.
            skip_unsupported: Let layers be that cannot be rewritten; `plan_attention` names them and the reasons.
            fold_scale: Multiply the scale of the scores into the weights of the queries.
            kwargs: For the constructor.

        Raises:
            UnsupportedModelError: Some layers cannot be rewritten, or with `skip_unsupported` all.
            PluginError: No layer attends.
        """
        plan = plan_attention(model, exclude_key, exclude_classes, fold_scale)
        if not skip_unsupported or not plan.rewrites:
            _refuse(model, plan)
        left = [f"^{re.escape(offender.path)}$" for offender in plan.offenders]
        exclude_key = "|".join([*([exclude_key] if exclude_key else []), *left]) or None
        return super().wrap_model(name, model, exclude_key, exclude_classes, fold_scale=fold_scale, **kwargs)

    @classmethod
    def find_layers(cls, model: nn.Module, *args: Any, **kwargs: Any) -> list[LayerMatch]:
        """The attention layers of a model.

        Raises:
            UnsupportedModelError: Some of them cannot be rewritten; the message lists them all.
            PluginError: There are none.
        """
        _refuse(model, plan_attention(model, *args, **kwargs))
        return super().find_layers(model, *args, **kwargs)


def _refuse(model: nn.Module, plan: AttentionPlan) -> None:
    count = len(plan.offenders)
    total = count + len(plan.rewrites)
    summary = f"{count} of {total} attentions of {type(model).__name__} cannot be rewritten per head"
    refuse_together(summary, plan.offenders, hint=_LEAVE_OUT)


def _attends(layer: nn.Module) -> bool:
    """Whether a layer has what attention has: a known class, or projections to q, k and v."""
    children = layer._modules.keys()
    known = isinstance(layer, Attention | CLIPAttention | nn.MultiheadAttention)
    return known or any(children >= projections for projections in _PROJECTIONS)


def _offender(path: str, layer: nn.Module, fold_scale: bool) -> Offender | None:
    if not isinstance(layer, Attention | CLIPAttention):
        return Offender(path, type(layer), f"nothing is known about what its class {type(layer).__name__} computes")
    if fold_scale and getattr(layer, "norm_q", None) is not None:
        reason = "its scale cannot go into the weights of the queries: they are normalized after that (qk_norm)"
        return Offender(path, type(layer), reason)
    return offender_against_heads(path, layer)
