"""SDXL's added conditions: the pooled text, and sinusoids of the picture's size, crop and target size."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from sdconvert.adapters.spec import GraphSize, Tensors, TensorSpec
from sdconvert.errors import UsageError
from sdconvert.registry import Offender

NAMES = ("text_embeds", "time_ids")


def has_added_conditions(model: Any) -> bool:
    """Whether a UNet or ControlNet is one of SDXL's."""
    return bool(model.config.addition_embed_type == "text_time")


def added_condition_specs(model: Any, size: GraphSize) -> tuple[TensorSpec, ...]:
    """The graph inputs `text_embeds` (1, P) and `time_embeds` (1, ids * C); none for other models."""
    if not has_added_conditions(model):
        return ()
    sinusoids = size.time_ids * model.config.addition_time_embed_dim
    text = model.config.projection_class_embeddings_input_dim - sinusoids
    if text <= 0:
        raise UsageError(
            f"{size.time_ids} time ids take all {model.config.projection_class_embeddings_input_dim} added channels",
            hint="SDXL has 6 time_ids, its refiner 5",
        )
    return TensorSpec("text_embeds", (1, text)), TensorSpec("time_embeds", (1, sinusoids), range=(-1.0, 1.0))


def with_time_ids(model: Any, size: GraphSize, inputs: Tensors) -> GraphSize:
    """A graph's size with the number of time ids that its `time_embeds` holds."""
    if not has_added_conditions(model) or "time_embeds" not in inputs:
        return size
    return replace(size, time_ids=inputs["time_embeds"].shape[-1] // model.config.addition_time_embed_dim)


def pack_added_conditions(model: Any, given: Mapping[str, Any] | None) -> Tensors:
    """Turn `added_cond_kwargs` of a call into graph inputs.

    Raises:
        UsageError: They are not exactly those that the model takes.
    """
    wanted = NAMES if has_added_conditions(model) else ()
    if sorted(given or ()) != sorted(wanted):
        raise UsageError(
            f"added_cond_kwargs holds {', '.join(sorted(given or ())) or 'nothing'}; "
            f"{type(model).__name__} takes {' and '.join(wanted) or 'nothing'} there",
            hint="SDXL's pipelines pass text_embeds and time_ids, those of SD1.5 and SD2.1 nothing",
        )
    if not given:
        return {}
    sinusoids = model.add_time_proj(given["time_ids"].flatten()).float()
    return {"text_embeds": given["text_embeds"], "time_embeds": sinusoids.reshape(len(given["text_embeds"]), -1)}


def call_with_added_conditions(model: Any, inputs: list[Tensor]) -> dict[str, Any]:
    """Take the added conditions off the front of a graph's inputs, as arguments of the model's call."""
    if not has_added_conditions(model):
        return {}
    return {"added_cond_kwargs": {"text_embeds": inputs.pop(0), "time_ids": inputs.pop(0)}}


def unsupported_conditions(model: Any) -> Iterator[Offender]:
    """Options of a UNet or ControlNet that need inputs which the graph does not have."""
    config = model.config
    options = {
        "addition_embed_type": None if has_added_conditions(model) else config.addition_embed_type,
        "class_embed_type": config.class_embed_type,
        "num_class_embeds": config.num_class_embeds,
        "encoder_hid_dim_type": config.encoder_hid_dim_type,
        "time_cond_proj_dim": getattr(config, "time_cond_proj_dim", None),
    }
    for name, value in options.items():
        if value is not None:
            yield Offender("", type(model), f"{name}={value!r} needs an input that the graph does not have")
