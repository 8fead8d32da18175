"""H11, H13: a plugin in place of a parameter never takes the parameter away, and can become it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdconvert.errors import PluginError
from sdconvert.plugins import PatchPluginBlock, PluginGroup, SinglePluginBlock

X = torch.linspace(-1, 1, 6).reshape(2, 3)


class Shift(SinglePluginBlock):
    """Doubles and shifts a weight."""

    def __init__(self, name: str, host: nn.Module, by: float = 1.0, hook_param: str = "weight") -> None:
        super().__init__(name, host, hook_param)
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, host_param: Tensor) -> Tensor:
        return host_param * 2 + self.by


class Fragile(nn.Linear):
    """Raises when told to, after its weight has been used."""

    error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        if self.error is not None:
            raise self.error
        return output


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_h11_a_failing_forward_leaves_the_parameter(error: BaseException, structure: Any) -> None:
    layer = Fragile(3, 3)
    Shift("shift", layer)
    before, weight, expected = structure(layer), layer.weight, layer(X)
    layer.error = error
    with pytest.raises(type(error)):
        layer(X)
    layer.error = None
    assert structure(layer) == before
    assert layer._parameters["weight"] is weight
    assert torch.equal(layer(X), expected)
    assert layer.weight is weight


def test_h11_a_failing_plugin_leaves_the_parameter() -> None:
    layer = nn.Linear(3, 3)
    weight = layer.weight
    Shift("first", layer)
    second = Shift("second", layer)
    second.by = None
    with pytest.raises(TypeError):
        layer(X)
    assert layer.weight is weight
    with second.disabled():
        assert torch.allclose(layer(X), nn.functional.linear(X, 2 * weight + 1, layer.bias))


def test_h11_gradients_reach_both() -> None:
    layer = nn.Linear(3, 3)
    plugin = Shift("shift", layer)
    layer(X).sum().backward()
    assert plugin.by.grad is not None
    assert torch.allclose(plugin.by.grad, X.sum() * 3)
    assert torch.allclose(layer.weight.grad, 2 * X.sum(0).expand(3, 3))
    assert list(plugin.parameters()) == [plugin.by]


def test_a_replaced_parameter_is_used() -> None:
    layer = nn.Linear(3, 3)
    Shift("shift", layer)
    layer.weight = nn.Parameter(torch.zeros(3, 3))
    assert torch.allclose(layer(X), nn.functional.linear(X, torch.ones(3, 3), layer.bias))
    assert torch.equal(layer.weight, torch.zeros(3, 3))


def test_h11_exports_with_the_plugin() -> None:
    layer = nn.Linear(3, 3)
    Shift("shift", layer)
    program = torch.export.export(layer, (X,), strict=False)
    assert torch.allclose(program.module()(X), layer(X))
    assert isinstance(layer.weight, nn.Parameter)


@pytest.mark.parametrize("name", ["kernel", "in_features", "nothing"])
def test_unknown_parameter_lists_the_known_ones(name: str, structure: Any) -> None:
    layer = nn.Linear(3, 3)
    before = structure(layer)
    with pytest.raises(PluginError, match=f"no parameter `{name}`\n.*weight, bias"):
        Shift("shift", layer, hook_param=name)
    assert structure(layer) == before


@pytest.mark.parametrize("patched", [False, True])
def test_h13_fuse_makes_the_value_permanent(patched: bool, structure: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    layer = model[0]
    before = structure(layer)
    if patched:
        PatchPluginBlock("patch", layer, host_model=model)
    plugin = Shift("shift", model[0])
    expected = model(X)
    plugin.fuse()
    assert torch.equal(model(X), expected)
    assert structure(layer) == before
    for again in (plugin.fuse, plugin.remove):
        with pytest.raises(PluginError, match="not attached"):
            again()


def test_h13_what_cannot_be_fused_says_so() -> None:
    layer = nn.Linear(3, 3)
    plugin = SinglePluginBlock("plain", layer)
    with pytest.raises(PluginError, match="cannot be fused"):
        plugin.fuse()
    assert plugin.attached


def test_h13_plugins_on_one_parameter_fuse_in_order() -> None:
    layer = nn.Linear(3, 3)
    first, second = Shift("first", layer, 1.0), Shift("second", layer, 5.0)
    expected = layer(X)
    with pytest.raises(PluginError, match="builds on plugin `first`"):
        second.fuse()
    group = PluginGroup({"first": first, "second": second})
    group.fuse()
    assert torch.allclose(layer(X), expected)
    with pytest.raises(PluginError, match="2 of 2 plugins are not attached"):
        group.fuse()


def test_output_none_keeps_the_output() -> None:
    class Looks(SinglePluginBlock):
        def forward(self, fea_in: tuple[Tensor, ...], fea_out: Tensor) -> None:
            self.seen = fea_out

    layer = nn.Linear(3, 3)
    plugin = Looks("looks", layer)
    assert torch.equal(layer(X), plugin.seen)
