"""Every family in fp64: with its attention per head, fused or beside the original, it computes what it computed."""

import copy
from typing import Any

import pytest
import torch
from model_families import FAMILIES, shared_family
from torch import Tensor

from sdconvert.models.attention import SHAAttentionPatch, plan_attention

LIMIT = 1e-10


def in_double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def relative_errors(found: dict[str, Tensor], reference: dict[str, Tensor]) -> list[float]:
    assert all(tensor.dtype == torch.float64 for tensor in [*found.values(), *reference.values()])
    return [float((found[name] - tensor).abs().max() / tensor.abs().max()) for name, tensor in reference.items()]


@pytest.mark.parametrize(
    ("name", "fold_scale"),
    [*((name, False) for name in FAMILIES), *((name, True) for name in ("pasd_unet", "vae", "clip", "pixart"))],
)
def test_every_family_computes_the_same_per_head(name: str, fold_scale: bool) -> None:
    family = shared_family(name)
    model: Any = copy.deepcopy(family.adapter.model).double()
    adapter, inputs = family.adapter_of(model), in_double(family.adapter.pack(family.call))
    reference = adapter.run(inputs)
    plan = plan_attention(model)
    assert plan.offenders == []
    assert {match.path for match in plan.rewrites} >= {layer.path for layer in adapter.attention_layers()}
    group = SHAAttentionPatch.wrap_model("sha", model, fold_scale=fold_scale)
    assert list(group) == [match.path for match in plan.rewrites]
    group.fuse()
    assert max(relative_errors(adapter.run(inputs), reference)) <= LIMIT
