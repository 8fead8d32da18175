"""H5, H7, H8, H9, H10: attaching and removing, names, keyword arguments, copies, extra inputs; for all four shapes."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdconvert.errors import PluginError
from sdconvert.plugins import (
    BasePluginBlock,
    MultiPluginBlock,
    PatchPluginBlock,
    PluginBlock,
    PluginNameError,
    SinglePluginBlock,
    feeding,
    match_layers,
)


class Scale(SinglePluginBlock):
    """Multiplies the output."""

    def __init__(self, name: str, host: nn.Module, factor: float = 2.0, **kwargs: Any) -> None:
        super().__init__(name, host, **kwargs)
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, fea_in: tuple[Tensor, ...], fea_out: Tensor) -> Tensor:
        return fea_out * self.factor


class Shift(SinglePluginBlock):
    """Shifts a parameter."""

    def __init__(self, name: str, host: nn.Module, by: float = 1.0, **kwargs: Any) -> None:
        super().__init__(name, host, hook_param="weight", **kwargs)
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, host_param: Tensor) -> Tensor:
        return host_param * 2 + self.by


class Skip(PluginBlock):
    """Adds the from-layer's input to the to-layer's output."""

    def __init__(self, name: str, from_layer: Any, to_layer: Any, **kwargs: Any) -> None:
        super().__init__(name, from_layer, to_layer)
        self.layer = nn.Linear(from_layer["layer"].in_features, to_layer["layer"].out_features)

    def forward(self, fea_from_in: tuple[Tensor, ...], fea_in: tuple[Tensor, ...], fea_out: Tensor) -> Tensor:
        return fea_out + self.layer(fea_from_in[0])


class Mix(MultiPluginBlock):
    """Adds a map of all from-layers' inputs to all to-layers."""

    def __init__(self, name: str, from_layers: Any, to_layers: Any, host_model: Any = None) -> None:
        super().__init__(name, from_layers, to_layers, host_model=host_model)
        self.layer = nn.Linear(4, 4)

    def forward(self, features: list[tuple[Tensor, ...]]) -> list[Tensor]:
        total = self.layer(torch.stack([feature[0] for feature in features]).sum(0))
        return [total] * len(self.to_paths)


class Halve(PatchPluginBlock):
    """Halves what enters and doubles what leaves."""

    def __init__(self, *args: Any, p: float = 2.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.p = nn.Parameter(torch.tensor(p))

    def pre_forward(self, x: Tensor) -> Any:
        return (x / 2,), {}

    def post_forward(self, output: Tensor, x: Tensor) -> Tensor:
        return output * self.p + x


class Chain(nn.Module):
    """Layers in a row, with the names that a Sequential would give them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        for i, layer in enumerate(layers):
            self.add_module(str(i), layer)

    def __getitem__(self, index: int) -> Any:
        return self.get_submodule(str(index))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(5):
            x = self[i](x)
        return x


def build() -> Chain:
    torch.manual_seed(0)
    return Chain(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)).eval()


ATTACH: dict[str, Callable[[nn.Module], BasePluginBlock]] = {
    "single": lambda model: Scale("plugin", model[2]),
    "param": lambda model: Shift("plugin", model[2]),
    "link": lambda model: Skip("plugin", *match_layers(["0", "4"], model)),
    "multi": lambda model: Mix("plugin", *(match_layers(s, model) for s in (["pre_hook:", "1"], ["2", "pre_hook:4"]))),
    "patch": lambda model: Halve("plugin", model[2], host_model=model),
}
KINDS = pytest.mark.parametrize("kind", ATTACH)
X = torch.linspace(-2, 2, 12).reshape(3, 4)


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(X)
    return output


@KINDS
def test_h5_removal_leaves_nothing(kind: str, structure: Any) -> None:
    model = build()
    before, expected = structure(model), run(model)
    plugin = ATTACH[kind](model)
    plugin.register_input_feeder_to(model)
    assert not torch.equal(run(model), expected)
    plugin.remove()
    assert structure(model) == before
    assert torch.equal(run(model), expected)
    with pytest.raises(PluginError, match="not attached"):
        plugin.remove()


@KINDS
def test_h5_host_keys_stay_while_attached(kind: str) -> None:
    model = build()
    keys, parameters = list(model.state_dict()), [id(parameter) for parameter in model.parameters()]
    plugin = ATTACH[kind](model)
    assert [key for key in model.state_dict() if "plugin" not in key] == keys
    assert [id(parameter) for parameter in model.parameters() if id(parameter) in parameters] == parameters
    own = {id(parameter) for parameter in plugin.parameters()}
    assert own.isdisjoint(parameters)
    assert len(own) == len(list(plugin.parameters())) > 0


@KINDS
def test_h5_state_dicts_load_into_a_plugged_model(kind: str) -> None:
    model, other = build(), build()
    plugin, _ = ATTACH[kind](model), ATTACH[kind](other)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    model.load_state_dict(other.state_dict())
    assert torch.equal(run(model), run(other))
    plain = build().state_dict()
    missing = model.load_state_dict(plain, strict=False)
    assert not missing.unexpected_keys
    assert all("plugin" in key for key in missing.missing_keys)
    with plugin.disabled():
        assert torch.equal(run(model), run(build()))


@KINDS
def test_h5_disabled_is_as_if_removed(kind: str) -> None:
    model = build()
    expected = run(model)
    plugin = ATTACH[kind](model)
    changed = run(model)
    with plugin.disabled():
        assert torch.equal(run(model), expected)
    assert torch.equal(run(model), changed)


@KINDS
def test_h10_copies_are_independent(kind: str) -> None:
    model = build()
    ATTACH[kind](model)
    expected = run(model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(clone.state_dict()) == list(model.state_dict())
        assert torch.equal(run(clone), expected)
        (plugin,) = [module for module in clone.modules() if isinstance(module, BasePluginBlock)]
        with torch.no_grad():
            for parameter in plugin.parameters():
                parameter.add_(1)
        assert not torch.equal(run(clone), expected)
        assert torch.equal(run(model), expected)
        plugin.remove()
        assert torch.equal(run(clone), run(build()))
        assert torch.equal(run(model), expected)


COMPOSITIONS: dict[
    str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Any], Callable[[Tensor, nn.Module], Tensor]]
]
COMPOSITIONS = {
    "patch+patch": (
        lambda model: Affine("first", model[0], host_model=model, a=2.0, b=1.0),
        lambda model: Affine("second", model[0], host_model=model, a=3.0, b=-1.0),
        lambda x, linear: 3 * (2 * linear(x) + 1) - 1,
    ),
    "patch+single": (
        lambda model: Affine("first", model[0], host_model=model, a=2.0, b=1.0),
        lambda model: Scale("second", model[0], 3.0),
        lambda x, linear: 3 * (2 * linear(x) + 1),
    ),
    "single+patch": (
        lambda model: Scale("first", model[0], 3.0),
        lambda model: Affine("second", model[0], host_model=model, a=2.0, b=1.0),
        lambda x, linear: 2 * (3 * linear(x)) + 1,
    ),
    "param+param": (
        lambda model: Shift("first", model[0], 1.0),
        lambda model: Shift("second", model[0], 5.0),
        lambda x, linear: nn.functional.linear(x, 2 * (2 * linear.weight + 1) + 5, linear.bias),
    ),
    "param+patch": (
        lambda model: Shift("first", model[0], 1.0),
        lambda model: Affine("second", model[0], host_model=model, a=2.0, b=1.0),
        lambda x, linear: 2 * nn.functional.linear(x, 2 * linear.weight + 1, linear.bias) + 1,
    ),
    "patch+param": (
        lambda model: Affine("first", model[0], host_model=model, a=2.0, b=1.0),
        lambda model: Shift("second", model[0], 1.0),
        lambda x, linear: 2 * nn.functional.linear(x, 2 * linear.weight + 1, linear.bias) + 1,
    ),
    "other container": (
        lambda model: Affine("first", model[0], host_model=model, a=2.0, b=1.0),
        lambda model: Negated("second", model[0], host_model=model),
        lambda x, linear: -(2 * linear(x) + 1),
    ),
}


class Affine(PatchPluginBlock):
    """a * output + b."""

    def __init__(self, *args: Any, a: float, b: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.a, self.b = a, b

    def post_forward(self, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.a * output + self.b


class NegatingContainer(PatchPluginBlock.container_cls):
    """A container with a forward of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = -self._host(*args, **kwargs)
        return output


class Negated(PatchPluginBlock):
    """Needs that container."""

    container_cls = NegatingContainer


@pytest.mark.parametrize("pair", COMPOSITIONS)
@pytest.mark.parametrize("removed", ["first", "second"])
def test_h7_plugins_on_one_layer_compose_in_order(pair: str, removed: str, structure: Any) -> None:
    first, second, expected = COMPOSITIONS[pair]
    model, linear = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)
    linear.load_state_dict(model[0].state_dict())
    before = structure(model)
    plugins = {"first": first(model), "second": second(model)}
    with torch.no_grad():
        assert torch.allclose(run(model), expected(X, linear), atol=1e-6)
        plugins.pop(removed).remove()
        alone = nn.Sequential(linear)
        {"first": second, "second": first}[removed](alone)
        assert torch.equal(run(model), run(alone))
    for plugin in plugins.values():
        plugin.remove()
    assert structure(model) == before


NAMES = {
    "weight": "is a Parameter",
    "in_features": "is a int",
    "forward": "is a method",
    "": "no name",
    "a.b": "no name",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("plugin_class", [Scale, Shift])
def test_h8_names_that_are_taken(name: str, plugin_class: type[SinglePluginBlock], structure: Any) -> None:
    model = build()
    before = structure(model)
    with pytest.raises(PluginNameError, match=NAMES[name]):
        plugin_class(name, model[0])
    with pytest.raises(PluginNameError):
        Halve(name, model[0], host_model=model)
    assert structure(model) == before


@KINDS
def test_h8_the_same_name_twice(kind: str, structure: Any) -> None:
    model = build()
    ATTACH[kind](model)
    before, expected = structure(model), run(model)
    with pytest.raises(PluginNameError, match="`plugin` is taken"):
        ATTACH[kind](model)
    assert structure(model) == before
    assert torch.equal(run(model), expected)


def test_h8_a_child_of_the_host_is_not_replaced() -> None:
    model = build()
    model.control = nn.Linear(4, 4)
    with pytest.raises(PluginNameError, match="is a Linear"):
        Mix("control", match_layers("0", model), match_layers("1", model))


@pytest.mark.parametrize("host", [nn.Sequential(nn.Linear(4, 4)), nn.ModuleList(), nn.ModuleDict()])
def test_containers_that_run_their_children_take_none(host: nn.Module, structure: Any) -> None:
    before = structure(host)
    with pytest.raises(PluginError, match="takes every child for one of its layers"):
        Scale("scale", host)
    assert structure(host) == before
    model = nn.Sequential(host)
    Affine("patch", host, host_model=model, a=1.0, b=0.0)
    with pytest.raises(PluginError, match="takes every child for one of its layers"):
        Scale("scale", model[0])


class SeesAll(SinglePluginBlock):
    """Records what it is shown."""

    def forward(self, fea_in: tuple[Any, ...], fea_out: Any, fea_kwargs: dict[str, Any]) -> None:
        self.seen = (fea_in, fea_kwargs)


def test_h9_keyword_arguments_are_seen(tiny_unet: Any, unet_inputs: dict[str, Any]) -> None:
    (match,) = match_layers(r"re:down_blocks\.0.*attn2$", tiny_unet)
    plugin = SeesAll("seen", match.module)
    tiny_unet(**unet_inputs)
    args, kwargs = plugin.seen
    assert torch.equal(kwargs["encoder_hidden_states"], unet_inputs["encoder_hidden_states"])
    assert args[0].shape == (1, 64, 8)


class KwargsLink(PluginBlock):
    """Replaces a keyword argument of the to-layer by the from-layer's input."""

    def from_layer_hook(self, host: Any, fea_in: Any, fea_out: Any, fea_kwargs: Any = None) -> None:
        self.feat_from = fea_kwargs["value"]

    def to_layer_hook(self, host: Any, fea_in: Any, fea_out: Any, fea_kwargs: Any = None) -> Any:
        return fea_in, {**fea_kwargs, "value": self.feat_from}


class Keyword(nn.Module):
    """Takes a keyword."""

    def forward(self, x: Tensor, value: float = 0.0) -> Tensor:
        return x + value


class TwoCalls(nn.Module):
    """Calls with different keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Keyword(), Keyword()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x, value=3.0), value=10.0)


def test_h9_keyword_arguments_can_be_changed() -> None:
    model = TwoCalls()
    KwargsLink("link", *match_layers(["pre_hook:a", "pre_hook:b"], model))
    assert torch.equal(model(X), X + 6)


class Conditioned(Scale):
    """The guide's way to get extra inputs."""

    cond: Any = None

    def __init__(self, name: str, host: nn.Module, host_model: nn.Module) -> None:
        super().__init__(name, host)
        self.register_input_feeder_to(host_model)

    def feed_input_data(self, data: Any) -> None:
        if isinstance(data, dict):
            self.cond = data["cond"]

    def forward(self, fea_in: tuple[Tensor, ...], fea_out: Tensor) -> Tensor:
        return fea_out if self.cond is None else fea_out * self.cond


def test_feeding_reaches_plugins_and_is_forgotten() -> None:
    model = build()
    expected = run(model)
    plugin = Conditioned("conditioned", model[4], model)
    with feeding(model, cond=3.0):
        assert torch.equal(run(model), 3 * expected)
        with feeding(model, cond=5.0):
            assert torch.equal(run(model), 5 * expected)
        assert torch.equal(run(model), 3 * expected)
    assert plugin.cond is None
    assert "cond" not in vars(plugin)
    with pytest.raises(ValueError, match="inside"), feeding(model, cond=3.0):
        raise ValueError("inside")
    with pytest.raises(KeyError), feeding(model, other=1):
        pass
    assert torch.equal(run(model), expected)


def test_feeding_a_copy_feeds_the_copys_plugin() -> None:
    model = build()
    plugin = Conditioned("conditioned", model[4], model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with feeding(clone, cond=3.0):
            assert torch.equal(run(clone), 3 * run(model))
            assert plugin.cond is None


def test_feeding_nobody_is_an_error() -> None:
    with pytest.raises(PluginError, match="takes extra inputs"), feeding(build(), cond=1):
        pass


def test_plugins_take_the_mode_of_their_host() -> None:
    model = build()
    assert not Scale("scale", model[0]).training
    assert Scale("scale", model.train()[2]).training
