"""H14: what a group of plugins learned is saved by layer, not by name, and loads whole or not at all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdconvert.errors import PluginError
from sdconvert.io.tensors import load_tensors, save_tensors
from sdconvert.models.pasd import build_pasd
from sdconvert.plugins import (
    LoraBlock,
    MultiPluginBlock,
    PatchPluginBlock,
    PluginBlock,
    PluginGroup,
    SinglePluginBlock,
)

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Model(nn.Module):
    """Two layers; the second one is met twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again = self.b

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.again(self.b(self.a(x)))
        return output


class Scale(PatchPluginBlock):
    """Multiplies what leaves."""

    wrapable_classes = (nn.Linear,)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.factor = nn.Parameter(torch.rand(()))

    def post_forward(self, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return output * self.factor


class Skip(PluginBlock):
    """Has a layer between two layers."""

    def __init__(self, name: str, *layers: Any) -> None:
        super().__init__(name, *layers)
        self.layer = nn.Linear(4, 4)

    def forward(self, fea_from_in: Any, fea_in: Any, fea_out: Tensor) -> Tensor:
        return fea_out + self.layer(fea_from_in[0])


class Root(MultiPluginBlock):
    """Sits on the model itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layer = nn.Linear(4, 4)

    def forward(self, features: list[tuple[Tensor, ...]]) -> list[Tensor]:
        return [self.layer(features[0][0])]


def lora(model: nn.Module, name: str) -> PluginGroup:
    group = LoraBlock.wrap_model(name, model, rank=2)
    for plugin in group.plugins:
        nn.init.normal_(plugin.layer.lora_up.weight)
    return group


KINDS: dict[str, tuple[Any, set[str]]] = {
    "lora": (
        lora,
        {f"{p}.___.{k}" for p in "ab" for k in ("alpha", "layer.lora_down.weight", "layer.lora_up.weight")},
    ),
    "patch": (lambda model, name: Scale.wrap_model(name, model), {"a.___.factor", "b.___.factor"}),
    "pair": (
        lambda model, name: Skip.wrap_model(name, model, "a", "b"),
        {"a.___.layer.weight", "a.___.layer.bias"},
    ),
    "multi": (
        lambda model, name: Root.wrap_model(name, model, ["a"], ["b"]),
        {"___.layer.weight", "___.layer.bias"},
    ),
}


def two_models() -> tuple[Model, Model]:
    torch.manual_seed(0)
    first, second = Model().eval(), Model().eval()
    second.load_state_dict(first.state_dict())
    return first, second


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strict", [True, False])
def test_h14_group_state_dict_round_trips_under_another_name(kind: str, strict: bool, tmp_path: Path) -> None:
    attach, keys = KINDS[kind]
    first, second = two_models()
    saved, loaded = attach(first, "trained"), attach(second, "other")
    assert not torch.equal(first(X), second(X))
    assert saved.state_dict().keys() == keys
    save_tensors(saved.state_dict(), tmp_path / "plugins.safetensors")
    loaded.load_state_dict(load_tensors(tmp_path / "plugins.safetensors"), strict=strict)
    assert torch.equal(first(X), second(X))


def test_h14_strict_loading_lists_what_does_not_fit_and_loads_nothing() -> None:
    model, other = two_models()
    group, state = lora(model, "lora"), lora(other, "lora").state_dict()
    before = model(X)
    state["c.___.alpha"] = state.pop("a.___.alpha")
    state["b.___.layer.lora_up.weight"] = torch.zeros(4, 3)
    with pytest.raises(PluginError) as caught:
        group.load_state_dict(state)
    for part in (
        r"1 missing: a.___.alpha",
        "1 unused: c.___.alpha",
        "1 of another shape: b.___.layer.lora_up.weight is (4, 3), not (4, 2)",
    ):
        assert part in str(caught.value)
    assert torch.equal(model(X), before)
    state["b.___.layer.lora_up.weight"] = torch.ones(4, 2)
    group.load_state_dict(state, strict=False)
    assert torch.equal(group["b"].layer.lora_up.weight, torch.ones(4, 2))
    with pytest.raises(PluginError, match="6 missing.*1 unused"):
        group.load_state_dict({"nothing": torch.zeros(1)}, strict=False)


def test_h14_saving_nothing_is_an_error() -> None:
    model = Model()
    for group in (PluginGroup(), PluginGroup({"a": SinglePluginBlock("plain", model.a)})):
        with pytest.raises(PluginError, match="no tensors to save"):
            group.state_dict()


def test_h14_weights_under_the_models_own_keys_are_saved_with_the_model() -> None:
    small = {
        "block_out_channels": [8, 16],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "layers_per_block": 1,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    unet, _ = build_pasd(
        small | {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]},
        small | {"conditioning_embedding_out_channels": [4, 4]},
    )
    with pytest.raises(PluginError, match="keeps weights under the model's own keys"):
        PluginGroup({"": unet.pasd}).state_dict()


def test_groups_give_an_optimizer_their_parameters() -> None:
    group = lora(Model(), "lora")
    (parameters,) = group.parameter_groups(lr=0.1)
    assert parameters["lr"] == 0.1
    assert len(parameters["params"]) == 4
    group.lr = 1e-3
    group["a"].requires_grad_(False)
    (parameters,) = group.parameter_groups(lr=0.1)
    assert parameters["lr"] == 1e-3
    assert len(parameters["params"]) == 2
    torch.optim.SGD(group.parameter_groups(lr=0.1))
