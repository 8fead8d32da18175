"""Another form of a layer next to the layer: compared in place, fused, refused by name."""

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from sdconvert.errors import PluginError, UnsupportedModelError
from sdconvert.plugins import PatchPluginContainer, SinglePluginBlock
from sdconvert.plugins.replacement import ReplacementPatch


class Transposed(nn.Module):
    """The same product, written the other way round."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x.T).T


class TransposedPatch(ReplacementPatch):
    wrapable_classes: ClassVar = (nn.Linear,)
    what = "a product the other way round"

    @classmethod
    def reason_against(cls, layer: nn.Linear) -> str | None:
        return None if layer.bias is None else "it has a bias"

    @classmethod
    def selects(cls, path: str, model: nn.Module) -> bool:
        return path != "1"

    @classmethod
    def replace(cls, layer: nn.Linear) -> Transposed:
        return Transposed(layer)


class Negate(SinglePluginBlock):
    def forward(self, fea_in: tuple[Any, ...], fea_out: Tensor) -> Tensor:
        return -fea_out


def layers(*biases: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4, bias=bias) for bias in biases))


def test_both_forms_run_in_place_and_one_is_left() -> None:
    model, x = layers(False, True), torch.randn(3, 4)
    expected, linear = model(x), model[0]
    group = TransposedPatch.wrap_model("other", model)
    assert group.keys() == {"0"}
    (patch,) = group.values()
    assert isinstance(model[0], PatchPluginContainer)
    assert torch.allclose(model(x), expected, atol=1e-6)
    with torch.no_grad():
        patch.replacement.weight = nn.Parameter(torch.zeros(4, 4))
    assert not torch.allclose(model(x), expected, atol=1e-6)
    with patch.disabled():
        assert torch.equal(model(x), expected)
    patch.replacement.weight = linear.weight
    copied = copy.deepcopy(model)
    group.fuse()
    assert [type(layer) for layer in model] == [Transposed, nn.Linear]
    assert "forward" not in vars(linear)
    for one in (model, copied):
        assert torch.allclose(one(x), expected, atol=1e-6)


def test_plugins_on_the_layer_go_on_working() -> None:
    model, x = layers(False), torch.randn(3, 4)
    expected = -model(x)
    Negate("negate", model[0])
    group = TransposedPatch.wrap_model("other", model)
    assert torch.allclose(model(x), expected, atol=1e-6)
    group.fuse()
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_refusals_name_every_layer_and_touch_none() -> None:
    model = layers(True, True, False, True)
    with pytest.raises(
        UnsupportedModelError,
        match=r"2 of 3 layers of Sequential cannot become a product[^:]*:\n`0`: it has a bias\n`3`",
    ):
        TransposedPatch.wrap_model("other", model)
    assert all(type(layer) is nn.Linear for layer in model)
    assert TransposedPatch.wrap_model("other", model, exclude_key="0|3").keys() == {"2"}
    with pytest.raises(UnsupportedModelError, match="it has a bias"):
        TransposedPatch("other", model[0], host_model=model)


def test_a_patch_without_layers_is_refused() -> None:
    assert not TransposedPatch.concerns(nn.Sequential(nn.ReLU()))
    with pytest.raises(PluginError, match="finds no layer in Sequential"):
        TransposedPatch.wrap_model("other", nn.Sequential(nn.Identity(), nn.Linear(4, 4, bias=False)))
