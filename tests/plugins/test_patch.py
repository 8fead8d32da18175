"""Patches: the container is transparent, and `fuse` puts the new module where the layer was, losing nothing."""

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from sdconvert.errors import PluginError
from sdconvert.plugins import (
    LayerMatch,
    PatchPluginBlock,
    PatchPluginContainer,
    PluginBlock,
    PluginGroup,
    PluginNameError,
    SinglePluginBlock,
    feeding,
    match_layers,
    require_fused,
)

X = torch.linspace(-1, 1, 6).reshape(2, 3)


class ConvLinear(nn.Module):
    """A linear map as a 1x1 convolution."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.conv = nn.Conv1d(linear.in_features, linear.out_features, 1)
        self.conv.weight = nn.Parameter(linear.weight.detach()[..., None])
        self.conv.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.conv(x[..., None])[..., 0]
        return output


class ToConv(PatchPluginBlock):
    """A linear layer as a 1x1 convolution."""

    wrapable_classes: ClassVar[Any] = (nn.Linear,)

    def patched_module(self) -> nn.Module:
        return ConvLinear(self.host)


class Activated(PatchPluginBlock):
    """Adds an activation."""

    def post_forward(self, output: Tensor, x: Tensor) -> Tensor:
        return output.relu()

    def patched_module(self) -> nn.Module:
        return nn.Sequential(self.host, nn.ReLU())


class Double(SinglePluginBlock):
    """Doubles the output."""

    wrapable_classes: ClassVar[Any] = (nn.Linear,)

    def forward(self, fea_in: Any, fea_out: Tensor) -> Tensor:
        return 2 * fea_out


class Shift(SinglePluginBlock):
    """Shifts a weight."""

    def __init__(self, name: str, host: nn.Module) -> None:
        super().__init__(name, host, hook_param="weight")

    def forward(self, host_param: Tensor) -> Tensor:
        return host_param + 1


class Block(nn.Module):
    """A layer with an attribute that others read."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x)
        return output


class Model(nn.Module):
    """Reads an attribute of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.last = Block(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.block(x) * self.block.heads)
        return output


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def test_the_container_shows_the_layers_attributes_and_keys(model: Model) -> None:
    keys, state, expected = list(model.state_dict()), copy.deepcopy(model.state_dict()), model(X)
    patch = PatchPluginBlock("patch", model.block, host_model=model)
    assert isinstance(model.block, PatchPluginContainer)
    assert model.block.heads == 2
    assert model.block.inner is patch.host.inner
    assert list(model.state_dict()) == keys
    model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in state.items()})
    assert not model(X).any()
    model.load_state_dict(state)
    assert torch.equal(model(X), expected)
    with pytest.raises(AttributeError, match="Block.*nothing"):
        _ = model.block.nothing


@pytest.mark.parametrize("name", ["plugins", "_host", "forward", "heads", "inner"])
def test_names_of_the_container_and_the_layer_are_taken(model: Model, structure: Any, name: str) -> None:
    before = structure(model)
    with pytest.raises(PluginNameError, match=f"`{name}` is taken"):
        PatchPluginBlock(name, model.block, host_model=model)
    assert structure(model) == before


def test_a_frozen_part_of_the_layer_stays_frozen(model: Model, structure: Any) -> None:
    model.train().block.inner.eval()
    before = structure(model)
    PatchPluginBlock("patch", model.block, host_model=model).remove()
    assert structure(model) == before


def test_a_place_can_be_given_in_three_ways(model: Model) -> None:
    layer = model.block.inner
    first = PatchPluginBlock("first", layer, host_model=model)
    second = PatchPluginBlock("second", layer, parent_block=model.block)
    third = PatchPluginBlock("third", layer, parent_block=model.block, host_name="inner")
    assert model.block.inner.plugins == [first, second, third]
    nowhere: list[dict[str, Any]] = [{}, {"host_model": nn.Linear(3, 3)}, {"parent_block": model}]
    for options in (*nowhere, {"parent_block": model, "host_name": "x"}):
        with pytest.raises(PluginError, match="place of the Linear"):
            PatchPluginBlock("fourth", layer, **options)


def test_h13_fuse_swaps_the_module(model: Model) -> None:
    expected, names = model(X), [name for name, _ in model.named_children()]
    group = ToConv.wrap_model("conv", model)
    group.fuse()
    require_fused(model)
    assert isinstance(model.last, ConvLinear)
    assert [name for name, _ in model.named_children()] == names
    assert torch.allclose(model(X), expected)
    for again in (group.fuse, group.remove):
        with pytest.raises(PluginError, match="2 of 2 plugins are not attached"):
            again()
    with pytest.raises(PluginError, match="not attached"):
        group["last"].fuse()


def test_patches_of_one_layer_fuse_together_in_order(model: Model) -> None:
    patches = [ToConv("conv", model.last, host_model=model), Activated("relu", model.last, host_model=model)]
    expected = model(X)
    PluginGroup({str(i): patch for i, patch in enumerate(patches)}).fuse()
    assert [type(module) for module in model.last] == [ConvLinear, nn.ReLU]
    assert torch.allclose(model(X), expected)
    assert not any(patch.attached for patch in patches)


def test_h13_a_patch_that_cannot_be_fused_changes_nothing(model: Model, structure: Any) -> None:
    ToConv("conv", model.last, host_model=model)
    plain = PatchPluginBlock("plain", model.last, host_model=model)
    before, expected = structure(model), model(X)
    with pytest.raises(PluginError, match="`plain` .* cannot be fused"):
        plain.fuse()
    assert structure(model) == before
    assert torch.equal(model(X), expected)


def test_plugins_on_the_layer_move_to_the_new_module(model: Model) -> None:
    before = model(X)
    single = Double("twice", model.last)
    patch = ToConv("conv", model.last, host_model=model)
    outer = Double("outer", model.last)
    link = _Bias("link", *match_layers(["block.inner", "last"], model))
    expected = model(X)
    patch.fuse()
    assert torch.allclose(model(X), expected)
    for plugin in (single, outer, link):
        plugin.remove()
    assert torch.allclose(model(X), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_fused_patch_stops_taking_inputs(model: Model) -> None:
    patch = ToConv("conv", model.last, host_model=model)
    patch.register_input_feeder_to(model)
    with feeding(model, cond=1):
        assert patch.input_data == {"cond": 1}
    patch.fuse()
    assert not hasattr(model, "input_feeder")


def test_a_match_from_before_the_patch_finds_the_container(model: Model) -> None:
    matches = match_layers(["block.inner", "last"], model)
    patch = Activated("relu", model.last, host_model=model)
    relu = model(X)
    link = _Bias("link", matches[0], matches[1])
    assert torch.equal(model(X), relu + 1)
    patch.remove()
    assert link.attached
    assert (model(X) - 1).min() < 0


def test_plugins_stay_on_a_layer_that_fusing_keeps(model: Model) -> None:
    single = Double("twice", model.last)
    patch = Activated("relu", model.last, host_model=model)
    expected = model(X)
    patch.fuse()
    assert torch.equal(model(X), expected)
    assert single.host is model.last[0]


def test_a_sequence_takes_no_plugin_over(model: Model, structure: Any) -> None:
    patch = Activated("relu", model.last, host_model=model)
    Double("twice", model.last)
    before, expected = structure(model), model(X)
    with pytest.raises(PluginError, match="child of a Sequential"):
        patch.fuse()
    assert structure(model) == before
    assert torch.equal(model(X), expected)


class _Bias(PluginBlock):
    def forward(self, fea_from_in: Any, fea_in: Any, fea_out: Tensor) -> Tensor:
        return fea_out + 1


@pytest.mark.parametrize("plugin_class", [Shift, Double])
def test_a_plugin_that_would_be_lost_is_named(model: Model, plugin_class: Any) -> None:
    class Rebuilt(PatchPluginBlock):
        def patched_module(self) -> nn.Module:
            return nn.Identity()

    plugin_class("plugin", model.block.inner)
    patch = Rebuilt("patch", model.block, host_model=model)
    with pytest.raises(PluginError, match="would lose the plugins on its `inner`"):
        patch.fuse()
    assert patch.attached


def test_h5_nested_containers_come_off_in_any_order(model: Model, structure: Any) -> None:
    class Other(PatchPluginContainer):
        pass

    class InOther(ToConv):
        container_cls = Other

    before = structure(model)
    for inner_first in (True, False):
        inner = ToConv("inner", model.last, host_model=model)
        outer = InOther("outer", model.last, host_model=model)
        for plugin in (inner, outer) if inner_first else (outer, inner):
            plugin.remove()
        assert structure(model) == before
    expected = model(X)
    inner = ToConv("inner", model.last, host_model=model)
    outer = InOther("outer", model.last, host_model=model)
    with pytest.raises(PluginError, match="fuse or remove those first"):
        outer.fuse()
    inner.fuse()
    outer.remove()
    assert torch.allclose(model(X), expected)


def test_foreign_hooks_on_a_container_are_not_lost_silently(model: Model) -> None:
    patch = ToConv("conv", model.last, host_model=model)
    handle = model.last.register_forward_hook(lambda module, args, output: None)
    for leave in (patch.remove, patch.fuse):
        with pytest.raises(PluginError, match="no plugin's"):
            leave()
    handle.remove()
    patch.fuse()


def test_h19_require_fused(model: Model) -> None:
    require_fused(model)
    Double("twice", model.last)
    _Bias("link", LayerMatch("block", model.block, model=model), LayerMatch("last", model.last, model=model))
    require_fused(model)
    shift = Shift("shift", model.last)
    with pytest.raises(PluginError, match=r"1 plugins .*`last\.shift`\n.*fuse\(\)"):
        require_fused(model)
    shift.fuse()
    ToConv.wrap_model("conv", model)
    with pytest.raises(PluginError, match=r"2 plugins .*`block\.inner`, `last`"):
        require_fused(model)
