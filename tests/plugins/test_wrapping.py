"""H2, H6: plugins on every layer of a class, without touching what is no layer of the model."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from sdconvert.errors import PluginError
from sdconvert.plugins import PatchPluginBlock, PatchPluginContainer, SinglePluginBlock


class Lora(SinglePluginBlock):
    """Has a module of a class that it wraps."""

    wrapable_classes: ClassVar[Any] = [nn.Linear]

    def __init__(self, name: str, host: nn.Module, **kwargs: Any) -> None:
        super().__init__(name, host, **kwargs)
        self.down = nn.Linear(host.in_features, host.out_features, bias=False)

    def forward(self, fea_in: tuple[Tensor, ...], fea_out: Tensor) -> Tensor:
        return fea_out + self.down(fea_in[0])


class LoraTuple(Lora):
    """`wrapable_classes` as a tuple."""

    wrapable_classes: ClassVar[Any] = (nn.Linear,)


class Identity(PatchPluginBlock):
    """Changes nothing."""

    wrapable_classes: ClassVar[Any] = (nn.Linear, nn.ReLU)


def build() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))})


@pytest.mark.parametrize("plugin_class", [Lora, LoraTuple])
def test_h2_every_match_is_wrapped(plugin_class: type[Lora]) -> None:
    model = build()
    group = plugin_class.wrap_model("lora", model)
    assert list(group) == ["a", "b.0", "b.2"]
    assert all(group[path] is model.get_submodule(f"{path}.lora") for path in group)


def test_h2_the_walk_never_enters_another_plugin() -> None:
    model = build()
    Lora.wrap_model("lora", model)
    assert list(Lora.wrap_model("second", model, exclude_key="^b")) == ["a"]
    assert not hasattr(model.a.lora.down, "second")


@pytest.mark.parametrize("exclude_key", [None, "^a"])
def test_h2_exclude_key_adds_to_the_guard(exclude_key: str | None) -> None:
    model = build()
    first = Identity.wrap_model("first", model)
    second = Identity.wrap_model("second", model, exclude_key=exclude_key)
    assert list(first) == ["a", "b.0", "b.1", "b.2"]
    assert list(second) == [path for path in first if exclude_key is None or path != "a"]
    containers = [name for name, module in model.named_modules() if isinstance(module, PatchPluginContainer)]
    assert containers == list(first)
    assert model.b[0].plugin_names == ["first", "second"]


def test_layers_inside_a_patched_layer_are_still_layers() -> None:
    model = build()
    PatchPluginBlock("outer", model["b"], host_model=model)
    assert list(Identity.wrap_model("inner", model)) == ["a", "b.0", "b.1", "b.2"]


def test_h2_exclude_classes_skip_what_is_below() -> None:
    assert list(Lora.wrap_model("lora", build(), exclude_classes=[nn.Sequential])) == ["a"]


def test_the_model_itself_may_match() -> None:
    layer = nn.Linear(2, 2)
    assert list(Lora.wrap_model("lora", layer)) == [""]
    with pytest.raises(PluginError, match="is the model itself"):
        Identity.wrap_model("identity", nn.Linear(2, 2))


@pytest.mark.parametrize("options", [{"exclude_key": "^$"}, {"exclude_classes": (nn.ModuleDict,)}])
def test_h2_no_match_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(PluginError, match="Lora finds no layer in ModuleDict .* looks for Linear"):
        Lora.wrap_model("lora", build(), **options)
    with pytest.raises(PluginError, match="wrapable_classes is empty"):
        SinglePluginBlock.wrap_model("single", build())


class Picky(Lora):
    """Fails on a layer, after its own construction has begun."""

    def __init__(self, name: str, host: nn.Module, **kwargs: Any) -> None:
        super().__init__(name, host, **kwargs)
        if host.out_features == 3:
            raise PluginError("three")


def test_a_failing_plugin_leaves_the_model_untouched(structure: Any) -> None:
    model = build()
    model.b[2] = nn.Linear(2, 3)
    before = structure(model)
    with pytest.raises(PluginError, match="three"):
        Picky.wrap_model("picky", model)
    assert structure(model) == before


@pytest.mark.parametrize("plugin_class", [Lora, Identity])
def test_h2_a_layer_at_two_paths_stays_one_layer(plugin_class: Any, structure: Any) -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), shared)})
    before = structure(model)
    group = plugin_class.wrap_model("plugin", model, exclude_classes=(nn.ReLU,))
    assert list(group) == ["a", "b.1"]
    assert len(group.plugins) == 1
    assert model.a is model.b[1]
    group.remove()
    assert structure(model) == before


def test_h6_identity_patches_on_every_child_of_every_list(tiny_unet: Any, unet_inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        expected = tiny_unet(**unet_inputs).sample
    keys = list(tiny_unet.state_dict())
    lists = [module for module in tiny_unet.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    plugins = [
        PatchPluginBlock("identity", child, parent_block=parent, host_name=name)
        for parent in lists
        for name, child in list(parent.named_children())
    ]
    assert len(plugins) > 30
    with torch.no_grad():
        assert torch.equal(tiny_unet(**unet_inputs).sample, expected)
    assert list(tiny_unet.state_dict()) == keys
    for plugin in plugins:
        plugin.remove()
    with torch.no_grad():
        assert torch.equal(tiny_unet(**unet_inputs).sample, expected)
    assert [name for name, _ in tiny_unet.named_parameters()] == keys
