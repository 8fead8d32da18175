"""The scale of attention's scores inside the weights of its queries: one multiplication less per head.

softmax(s (W x) k) = softmax(((s W) x) k): weights and their grids are multiplied by s, and the projection's output has
the range that the scaled queries had. Bits stay equal only where s is a power of two, so it is an option.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from sdconvert.errors import UsageError
from sdconvert.models.attention import SHAAttention

_SIZES = ("max", "min", "scale")


def fold_scales(model: nn.Module) -> dict[str, float]:
    """Fold the scales of a model in SHA form, for good.

    Returns:
        Factor of every parameter that was multiplied.

    Raises:
        UsageError: No attention has a scale to fold.
        UnsupportedModelError: A layer normalizes its queries after the projection.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, SHAAttention)}
    factors = {
        f"{path}.{name}": factor
        for path, layer in layers.items()
        if layer.scores.scale is not None
        for name, factor in layer.fold_scale().items()
    }
    if not factors:
        raise UsageError("fold_scale has no effect: no attention has a scale to fold", hint="leave it out")
    return factors


def fold_sections(sections: Mapping[str, Any], factors: Mapping[str, float]) -> dict[str, Any]:
    """Encodings of a model in SHA form after `fold_scales`.

    Args:
        sections: As `read_encodings` gives them, with inherited or own ranges.
        factors: From `fold_scales`.
    """
    params = {key: _scaled(entries, factors.get(key, 1.0)) for key, entries in sections["param_encodings"].items()}
    activations = dict(sections["activation_encodings"])
    functional = {path: dict(places) for path, places in sections["functional_encodings"].items()}
    for query in (key.removesuffix(".weight") for key in factors if key.endswith(".weight")):
        layer, _, head = query.rpartition(".to_q_convs.")
        if (scaled := functional.get(layer, {}).pop(f"mul.{head}", None)) is not None:
            activations[query] = {"output": {"0": scaled}}
    return {
        "param_encodings": params,
        "activation_encodings": activations,
        "functional_encodings": functional,
    }


def _scaled(entries: list[dict[str, Any]], factor: float) -> list[dict[str, Any]]:
    if factor == 1.0:
        return entries
    return [entry | {name: entry[name] * factor for name in _SIZES if name in entry} for entry in entries]
