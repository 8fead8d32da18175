"""H4, H12: features live for one call of the host model and come from layers that have run in it."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdconvert.errors import PluginError
from sdconvert.plugins import ExecutionOrderError, MultiPluginBlock, PatchPluginBlock, PluginBlock, match_layers

X = torch.linspace(-1, 1, 6).reshape(2, 3)


class Model(nn.Module):
    """Runs its layers in an order that can be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.order = "abc"

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            if name == "!":
                raise RuntimeError("stop")
            x = self.get_submodule(name)(x)
        return x


class Add(PluginBlock):
    """Adds the from-layer's input."""

    def forward(self, fea_from_in: tuple[Tensor, ...], fea_in: tuple[Tensor, ...], fea_out: Tensor | None) -> Any:
        return (fea_in[0] + fea_from_in[0],) if fea_out is None else fea_out + fea_from_in[0]


class Sum(MultiPluginBlock):
    """Gives every to-layer the sum of the from-layers' inputs."""

    def forward(self, features: list[tuple[Tensor, ...]]) -> list[Tensor]:
        return [torch.stack([feature[0] for feature in features]).sum(0)] * len(self.to_paths)


class Keeps(MultiPluginBlock):
    """Keeps features the way a guide's reader would: in attributes and in a list of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls = 0
        self.kept: list[Tensor] = []

    def from_layer_hook(self, host: nn.Module, fea_in: tuple[Tensor, ...], fea_out: Any, idx: int) -> None:
        self.calls += 1
        self.data_input = fea_in
        self.kept.append(fea_in[0] * 1)

    def to_layer_hook(self, host: nn.Module, fea_in: tuple[Tensor, ...], fea_out: Tensor, idx: int) -> Tensor:
        self.refs = [weakref.ref(tensor) for tensor in self.kept]
        return fea_out + self.kept[-1]


@pytest.mark.parametrize("prefix", ["", "pre_hook:"])
def test_to_layers_may_be_changed_at_either_side(prefix: str) -> None:
    for plugin_class, layers in ((Add, ("a", f"{prefix}c")), (Sum, (["a"], [f"{prefix}c"]))):
        model, stock = Model(), Model()
        stock.load_state_dict(model.state_dict())
        plugin_class("plugin", *(_match(layer, model) for layer in layers))
        hidden = stock.b(stock.a(X))
        expected = stock.c(hidden + X) if prefix else stock.c(hidden) + X
        assert torch.allclose(model(X), expected)


def _match(selector: Any, model: nn.Module) -> Any:
    matches = match_layers(selector, model)
    return matches if isinstance(selector, list) else matches[0]


def test_h4_unequal_counts_show_both_lists() -> None:
    model = Model()
    with pytest.raises(PluginError, match=r"2 and 1: from \[`a`, `b`\] to \[`pre_hook:c`\]"):
        Add.wrap_model("add", model, ["a", "b"], "pre_hook:c")
    assert not hasattr(model.a, "add")


def test_wrap_model_pairs_layers_or_attaches_none() -> None:
    model = Model()
    group = Add.wrap_model("add", model, ["a", "b"], ["b", "c"])
    assert list(group) == ["a", "b"]
    group.remove()
    with pytest.raises(PluginError, match="taken"):
        Add.wrap_model("add", model, ["a", "b", "prehook:a"], "re:[abc]$")
    assert not hasattr(model.a, "add")


def test_wrap_model_of_a_multi_plugin() -> None:
    model = Model()
    group = Sum.wrap_model("sum", model, "re:[ab]$", ["c"])
    assert group[""].from_paths == ["a", "b"]
    assert model.sum is group[""]


def test_h12_nothing_is_referenced_after_the_forward() -> None:
    model = Model()
    plugin = Keeps("keeps", match_layers(["a", "b"], model), match_layers("c", model))
    model(X)
    gc.collect()
    assert len(plugin.refs) == 2
    assert all(ref() is None for ref in plugin.refs)
    assert plugin.kept == []
    assert not hasattr(plugin, "data_input")
    assert plugin.calls == 2


@pytest.mark.parametrize("plugin_class", [Add, Sum])
def test_h12_default_features_are_dropped(plugin_class: Any) -> None:
    model = Model()
    layers = match_layers(["a", "c"], model)
    plugin = Add("plugin", *layers) if plugin_class is Add else Sum("plugin", layers[:1], layers[1:])
    model(X)
    assert not [value for value in vars(plugin).values() if isinstance(value, Tensor | tuple)]
    assert not plugin.feat_from


def test_h12_the_last_of_two_runs_wins_or_is_reduced() -> None:
    class Max(Add):
        def reduce(self, earlier: tuple[Tensor, ...], later: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (torch.maximum(earlier[0], later[0]),)

    for plugin_class in (Add, Max):
        model = Model()
        plugin_class("add", *match_layers(["a", "c"], model))
        model.order = "aac"
        first = model.a(X)
        feature = first if plugin_class is Add else torch.maximum(X, first)
        assert torch.allclose(model(X), nn.functional.linear(model.a(first), model.c.weight, model.c.bias) + feature)


def test_h12_the_last_run_wins_in_a_multi_plugin() -> None:
    model = Model()
    plugin = Sum("sum", match_layers(["a"], model), match_layers(["c"], model))
    model.order = "aac"
    first = model.a(X)
    output = model(X)
    plugin.remove()
    assert torch.allclose(output, model(X) + first)


@pytest.mark.parametrize("order", ["cab", "bca", "c"])
def test_h12_to_before_from_names_both_layers(order: str) -> None:
    model = Model()
    model.order = order
    plugin: Any = Add("add", *match_layers(["a", "c"], model))
    with pytest.raises(ExecutionOrderError, match="layer `c` runs before `a`"):
        model(X)
    plugin.remove()
    Sum("sum", match_layers(["a", "b"], model), match_layers(["c"], model))
    with pytest.raises(ExecutionOrderError, match="layer `c` runs before `[ab]`"):
        model(X)


def test_h12_nothing_is_stale_after_an_aborted_forward() -> None:
    for attach in (
        lambda model: Add("plugin", *match_layers(["a", "c"], model)),
        lambda model: Sum("plugin", match_layers(["a", "b"], model), match_layers("c", model)),
        lambda model: Keeps("plugin", match_layers(["a"], model), match_layers("c", model)),
    ):
        model = Model()
        plugin = attach(model)
        expected = model(X)
        model.order = "a!"
        with pytest.raises(RuntimeError, match="stop"):
            model(X + 1)
        assert not [value for value in vars(plugin).values() if isinstance(value, Tensor)]
        model.order = "abc"
        assert torch.equal(model(X), expected)
        model.order = "bc"
        with pytest.raises((ExecutionOrderError, IndexError)):
            model(X)


def test_a_layer_outside_a_call_of_its_model() -> None:
    model = Model()
    plugin = Add("add", *match_layers(["a", "c"], model))
    model.a(X)
    assert plugin.feat_from is None
    with pytest.raises(ExecutionOrderError, match="layer `c` runs outside a call of Model"):
        model.c(X)
    with plugin.disabled():
        assert torch.equal(model.c(X), nn.functional.linear(X, model.c.weight, model.c.bias))


def test_plain_dicts_need_the_host_model() -> None:
    model = Model()
    layers = [{"layer": model.a, "pre_hook": False}, {"layer": model.c, "pre_hook": False}]
    with pytest.raises(PluginError, match="whose call"):
        Add("add", *layers)
    with pytest.raises(PluginError, match="Model contains no such Linear"):
        Add("add", layers[0], {"layer": nn.Linear(3, 3), "pre_hook": False}, host_model=model)
    expected = Add("add", *layers, host_model=model)
    assert (expected.from_path, expected.to_path) == ("a", "c")


def test_a_match_is_found_again_at_its_own_path() -> None:
    """Also where another path leads to the same layer, a container has taken its place, or another layer has."""
    model = Model()
    model.b = model.a
    assert Add("add", *match_layers(["b", "c"], model)).from_path == "b"
    layers = match_layers(["a", "c"], model)
    PatchPluginBlock("patch", model.c, host_model=model)
    plugin = Add("late", *layers)
    assert plugin.to_path == "c"
    assert [hook.module for hook in plugin._hooks if hook.method == "_to_hook"] == [model.c]
    model.a = nn.Linear(3, 3)
    assert Add("later", *layers).from_path == "b", "where it has gone"
    model.b = nn.Linear(3, 3)
    with pytest.raises(PluginError, match="Model contains no such Linear"):
        Add("last", *layers)


class Meets(MultiPluginBlock):
    """Notes when it meets an input of layer `a`, twice per call."""

    def __init__(self, name: str, model: Model, met: list[str], *, first: bool) -> None:
        layers = match_layers("pre_hook:a", model)
        super().__init__(name, layers, layers, host_model=model, first=first)
        self.met = met

    def from_layer_hook(self, host: nn.Module, fea_in: Any, fea_out: Any, idx: int) -> None:
        self.met.append(f"{self.name}:from")

    def to_layer_hook(self, host: nn.Module, fea_in: Any, fea_out: Any, idx: int) -> None:
        self.met.append(f"{self.name}:to")


def test_a_plugin_meets_inputs_ahead_of_those_before_it_if_it_asks_for_that() -> None:
    model, met = Model(), list[str]()
    for name, first in (("one", False), ("two", True), ("three", False), ("four", True)):
        Meets(name, model, met, first=first)
    expected = [f"{name}:{what}" for name in ("four", "two", "one", "three") for what in ("from", "to")]
    model(X)
    assert met == expected
    PatchPluginBlock("patch", model.a, host_model=model)  # takes the layer's place and its hooks
    met.clear()
    model(X)
    assert met == expected
