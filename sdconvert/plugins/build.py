r"""Plugins from a configuration: which class, with which arguments, on which layers.

    plugin_unet:                                     the model: plugin_unet, plugin_controlnet or plugin_TE
      lora1:                                         the plugin's name
        _target_: sdconvert.plugins.LoraBlock        its class, or the class's wrap_model
        alpha: 0.5                                   an argument of it
        lr: 1e-4                                     for whoever trains it; `train: false` freezes it
        layers: ['re:.*\.attn.?$']                  from_layer and to_layer, or from_layers and to_layers, for
                                                     the shapes that link layers

Hydra's `instantiate` makes the arguments, so they may be objects themselves (`_target_` inside). `_partial_: true` may
be left out. A target is code that is imported and run: read a configuration before you use it.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from sdconvert.errors import PluginError
from sdconvert.plugins.base import BasePluginBlock, unwrap
from sdconvert.plugins.configuration import PluginEntry, read_entries, section_models
from sdconvert.plugins.group import PluginGroup
from sdconvert.plugins.multi import MultiPluginBlock
from sdconvert.plugins.pair import PluginBlock
from sdconvert.plugins.selectors import match_layers
from sdconvert.plugins.wrapping import WrapablePlugin

_HYDRA = ("_convert_", "_recursive_")
_SHAPES: dict[type, tuple[str, ...]] = {
    WrapablePlugin: ("layers",),
    PluginBlock: ("from_layer", "to_layer"),
    MultiPluginBlock: ("from_layers", "to_layers"),
}


def build_plugins(model: nn.Module, cfg: Mapping[str, Any]) -> dict[str, PluginGroup]:
    """Attach the plugins of a configuration in its order, or none of them if one fails.

    Each plugin's selectors see the model with the plugins before it.

    Args:
        model: The host.
        cfg: Plugins by name, such as the content of `plugin_unet`; as a dict or from OmegaConf.

    Returns:
        The plugins of each name by layer path.

    Raises:
        PluginError: An entry is malformed, its target is no plugin, or a selector matches nothing.
    """
    groups: dict[str, PluginGroup] = {}
    with ExitStack() as undo:
        for entry in read_entries(cfg):
            groups[entry.name] = _build(entry, model)
            undo.callback(groups[entry.name].remove)
        undo.pop_all()
    return groups


def build_pipeline_plugins(pipeline: Any, cfg: Mapping[str, Any]) -> dict[str, dict[str, PluginGroup]]:
    """Attach the plugins of all sections to the models of a pipeline, or none of them if one fails.

    Args:
        pipeline: Has the models as attributes: `unet`, `controlnet`, `text_encoder`.
        cfg: Any of the sections `plugin_unet`, `plugin_controlnet` and `plugin_TE`.

    Returns:
        What `build_plugins` returns, by section.

    Raises:
        PluginError: A section is unknown or about a model that the pipeline lacks; or as `build_plugins`.
    """
    built: dict[str, dict[str, PluginGroup]] = {}
    with ExitStack() as undo:
        for section, model in section_models(pipeline, cfg).items():
            built[section] = build_plugins(model, cfg[section])
            for group in built[section].values():
                undo.callback(group.remove)
        undo.pop_all()
    return built


def _build(entry: PluginEntry, model: nn.Module) -> PluginGroup:
    target, cls = _locate(entry)
    keys = next(keys for shape, keys in _SHAPES.items() if issubclass(cls, shape))
    if issubclass(cls, MultiPluginBlock) and "from_layers" not in _parameters(cls):
        keys = ()  # it knows its layers itself
    if set(entry.selectors) != set(keys):
        raise PluginError(
            f"plugin `{entry.name}` ({cls.__name__}) takes {_listed(keys)}, but has {_listed(entry.selectors)}",
            hint="the shape of the plugin decides which selectors it has",
        )
    if issubclass(cls, WrapablePlugin):
        group = _wrap(entry, cls, target, model)
    elif keys:
        _check_arguments(entry, cls, keys, target)
        group = PluginGroup(cls.wrap_model(entry.name, model, **entry.selectors, **_make_arguments(entry)))
    else:
        _check_arguments(entry, cls, ("host_model",), target)
        group = PluginGroup({"": cls(entry.name, host_model=model, **_make_arguments(entry))})
    group.lr = entry.lr
    if not entry.train:
        _freeze(group)
    return group


def _wrap(entry: PluginEntry, cls: type[WrapablePlugin], target: Any, model: nn.Module) -> PluginGroup:
    """Attach to each layer; of a layer that is none of its classes, to all in it that are."""
    _check_arguments(entry, cls, ("host",), target)
    wanted = tuple(cls.wrapable_classes)
    group, done = PluginGroup(), dict[nn.Module, WrapablePlugin]()
    with ExitStack() as undo:
        for match in match_layers(entry.selectors["layers"], model):
            layer = unwrap(match.module)
            if match.pre_hook:
                raise PluginError(
                    f"plugin `{entry.name}`: `pre_hook:{match.path}` is nothing that a {cls.__name__} can hang on",
                    hint="only plugins from layers to layers take pre_hook:",
                )
            if target is not cls or (wanted and not isinstance(layer, wanted)):
                below = cls.wrap_model(entry.name, match.module, **_make_arguments(entry))
                undo.callback(PluginGroup(below).remove)
                group |= {f"{match.path}.{path}".strip("."): plugin for path, plugin in below.items()}
            elif layer in done:
                done[layer].attach_again(match)
                group[match.path] = done[layer]
            else:
                place = cls.place(match)
                done[layer] = cls.wrap_layer(entry.name, match.module, **place, **_make_arguments(entry))
                undo.callback(done[layer].remove)
                group[match.path] = done[layer]
        undo.pop_all()
    return group


def _locate(entry: PluginEntry) -> tuple[Any, Any]:
    """The target, and the class of plugins that it is or belongs to."""
    target = _partial(entry, {}).func
    cls: Any = target if isinstance(target, type) else getattr(target, "__self__", None)
    is_plugin = isinstance(cls, type) and issubclass(cls, tuple(_SHAPES))
    if not is_plugin or target not in (cls, cls.wrap_model):
        raise PluginError(
            f"plugin `{entry.name}`: `{entry.target}` is no plugin",
            hint="name a subclass of SinglePluginBlock, PluginBlock, MultiPluginBlock or PatchPluginBlock, "
            "or its wrap_model",
        )
    return target, cls


def _make_arguments(entry: PluginEntry) -> dict[str, Any]:
    """The arguments anew, so that no two layers share an object."""
    return dict(_partial(entry, entry.arguments).keywords)


def _partial(entry: PluginEntry, arguments: dict[str, Any]) -> Any:
    try:
        return instantiate({"_convert_": "all", **arguments, "_target_": entry.target, "_partial_": True})
    except (HydraException, OmegaConfBaseException) as error:
        raise PluginError(
            f"plugin `{entry.name}`: `{entry.target}` cannot be made: {error}",
            hint="_target_ is the path by which Python imports the class",
        ) from error


def _check_arguments(entry: PluginEntry, cls: type[BasePluginBlock], given: Iterable[str], target: Any) -> None:
    """Refuse arguments that the plugin does not have, before anything is attached."""
    own = set() if target is cls else set(inspect.signature(target).parameters)
    parameters = _parameters(cls)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    unknown = [name for name in entry.arguments if name not in parameters and name not in own and name not in _HYDRA]
    optional = [p.name for p in parameters.values() if p.default is not p.empty or p.kind is p.VAR_POSITIONAL]
    needed = [name for name in list(parameters)[1:] if name not in {*optional, *given, *entry.arguments}]
    if unknown or needed:
        faults = [*(f"has no `{name}`" for name in unknown), *(f"needs `{name}`" for name in needed)]
        known = [name for name in list(parameters)[1:] if name not in given]
        raise PluginError(
            f"plugin `{entry.name}`: {cls.__name__} {', '.join(faults)}", hint=f"its arguments: {_listed(known)}"
        )


def _parameters(cls: type[BasePluginBlock]) -> dict[str, inspect.Parameter]:
    """Of the constructor, without self; the first is the name."""
    constructor: Callable[..., None] = cls.__init__
    return dict(list(inspect.signature(constructor).parameters.items())[1:])


def _freeze(group: PluginGroup) -> None:
    for plugin in group.plugins:
        for module in (plugin, *(parent.get_submodule(name) for parent, name in plugin.grafts)):
            module.requires_grad_(False).eval()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "nothing"
