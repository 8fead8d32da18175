"""Which layers the plugins of a model are on, and which ones the selectors of a configuration would find."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sdconvert.plugins.base import BasePluginBlock, unwrap
from sdconvert.plugins.build import build_plugins
from sdconvert.plugins.configuration import read_entries
from sdconvert.plugins.container import PatchPluginContainer
from sdconvert.plugins.hooks import PluginHook, plugin_hooks
from sdconvert.plugins.selectors import LayerMatch, iter_layers, match_layers

_ROLES = {
    "_replace_output": "output",
    "_shadow": "parameter",
    "_from_hook": "from",
    "_to_hook": "to",
}


@dataclass(frozen=True)
class Resolved:
    """One selector of one plugin, and a layer that it found.

    Attributes:
        plugin: Its name and class.
        role: What it does with the layer: `from`, `to`, `output`, `parameter`, `patch`; or the key of the selector.
        selector: As written, or the one that names just this layer.
        layer: Path of the layer; empty for the model itself.
        layer_class: Its class.
    """

    plugin: str
    role: str
    selector: str
    layer: str
    layer_class: str


def resolve_attached(model: nn.Module) -> list[Resolved]:
    """The layers that the plugins of a model are on, read off the hooks and containers that are there."""
    found = []
    for path, module in iter_layers(model):
        for layer in _stack(module):
            if isinstance(layer, PatchPluginContainer):
                found += [_resolved(plugin, "patch", path, module, pre=False) for plugin in layer.plugins]
            for hook in plugin_hooks(layer):
                if role := _role(hook):
                    found.append(_resolved(hook.plugin, role, path, module, pre=hook.pre and role in ("from", "to")))
    return found


def resolve_config(model: nn.Module, cfg: Mapping[str, Any]) -> list[Resolved]:
    """The layers that the selectors of a configuration find, each plugin's in the model with those before it.

    Every plugin is attached once and taken off again, so what could not be built is an error here too.

    Raises:
        PluginError: As `build_plugins`.
    """
    found, built = [], []
    try:
        for entry in read_entries(cfg):
            label = f"{entry.name} ({entry.target.removesuffix('.wrap_model').rpartition('.')[2]})"
            matches = [
                (key, text, match)
                for key, selectors in entry.selectors.items()
                for text in selectors
                for match in match_layers(text, model)
            ]
            group = build_plugins(model, {entry.name: cfg[entry.name]})[entry.name]
            built.append(group)
            for key, text, match in matches:
                layers = _below(match, list(group)) if key == "layers" else [(match.path, match.module)]
                found += [Resolved(label, key, text, path, type(unwrap(module)).__name__) for path, module in layers]
            if not matches:
                found += [one for one in resolve_attached(model) if one.plugin.startswith(f"{entry.name} ")]
    finally:
        for group in reversed(built):
            group.remove()
    return found


def _below(match: LayerMatch, attached: list[str]) -> list[tuple[str, nn.Module]]:
    """What a selector's layer stands for: itself, or those below it that the plugin is on."""
    assert match.model is not None  # for the type checker
    prefix = f"{match.path}." if match.path else ""
    paths = [path for path in attached if path == match.path or path.startswith(prefix)]
    return [(path, match.model.get_submodule(path)) for path in paths]


def _stack(module: nn.Module) -> Iterator[nn.Module]:
    """A layer's containers from the outermost inwards, then the layer."""
    while isinstance(module, PatchPluginContainer):
        yield module
        module = module.get_submodule("_host")
    yield module


def _role(hook: PluginHook) -> str | None:
    return _ROLES.get(hook.method)


def _resolved(plugin: nn.Module, role: str, path: str, module: nn.Module, *, pre: bool) -> Resolved:
    assert isinstance(plugin, BasePluginBlock)  # for the type checker
    label = f"{plugin.name} ({type(plugin).__name__})"
    selector = f"{'pre_hook:' if pre else ''}{path}"
    return Resolved(label, role, selector, path, type(unwrap(module)).__name__)
