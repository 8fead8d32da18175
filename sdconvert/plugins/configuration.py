"""What a configuration of plugins says, as data: which class, with which arguments, on which layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from yaml import YAMLError

from sdconvert.errors import PluginError

SECTIONS = {"plugin_unet": "unet", "plugin_controlnet": "controlnet", "plugin_TE": "text_encoder"}
"""The model of a pipeline that a section of a configuration is about."""
_SELECTORS = ("layers", "from_layer", "to_layer", "from_layers", "to_layers")


@dataclass(frozen=True)
class PluginEntry:
    """One plugin of a configuration.

    Attributes:
        name: Of the plugin on its hosts.
        target: Dotted path of its class or of the class's `wrap_model`.
        selectors: By the keys that its shape has.
        arguments: What else it is made with.
        lr: Its learning rate, if it has one of its own.
        train: Whether its parameters are to be trained.
    """

    name: str
    target: str
    selectors: dict[str, list[str]]
    arguments: dict[str, Any]
    lr: float | None
    train: bool


def read_plugin_config(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file of plugins.

    Args:
        path: Of the file.
        overrides: `plugin_unet.lora1.alpha=0.5` each; the plugin must be in the file.

    Raises:
        PluginError: The file is missing, no YAML, or has no such plugin.
    """
    try:
        config = OmegaConf.load(path)
        merged = OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides)))
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise PluginError(f"`{path}` cannot be read as plugins: {error!s}", hint="check the path and YAML") from error
    if not isinstance(config, DictConfig):
        raise PluginError(f"`{path}` holds no mapping", hint=f"its sections are {', '.join(SECTIONS)}")
    for override in overrides:
        section, name = [*override.partition("=")[0].split("."), "", ""][:2]
        if name not in (config.get(section) or {}):
            raise PluginError(
                f"`{override}`: `{path}` has no plugin `{section}.{name}`", hint="write section.plugin.key=value"
            )
    return _plain(merged)


def read_entries(cfg: Mapping[str, Any]) -> list[PluginEntry]:
    """Take apart the plugins of one model; the configuration stays as it is and can be read again.

    Raises:
        PluginError: There are none, or one of them is malformed; the message names it.
    """
    plugins = _plain(cfg)
    if not plugins:
        raise PluginError("the configuration has no plugins", hint="write name: {_target_: ..., layers: [...]}")
    return [_entry(str(name), content) for name, content in plugins.items()]


def section_models(pipeline: Any, cfg: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The models that the sections of a configuration are about.

    Raises:
        PluginError: A section is unknown, or about a model that the pipeline lacks.
    """
    models = {}
    for section in cfg:
        if section not in SECTIONS:
            raise PluginError(
                f"`{section}` is no section of a plugin configuration", hint=f"known: {', '.join(SECTIONS)}"
            )
        model = getattr(pipeline, SECTIONS[section], None)
        if model is None:
            raise PluginError(
                f"`{section}` is for a {SECTIONS[section]}, which is not loaded", hint="load it, or drop the section"
            )
        models[section] = model
    return models


def _plain(cfg: Any) -> dict[str, Any]:
    """A configuration as plain containers of its own, interpolations resolved."""
    try:
        config = cfg if OmegaConf.is_config(cfg) else OmegaConf.create(dict(cfg), flags={"allow_objects": True})
        plain: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise PluginError(f"the plugin configuration cannot be resolved: {error}") from error
    return dict(plain)


def _entry(name: str, content: Any) -> PluginEntry:
    if not isinstance(content, dict) or not isinstance(content.get("_target_"), str):
        raise PluginError(
            f"plugin `{name}` does not say what it is", hint="give it _target_: package.module.ClassOfThePlugin"
        )
    arguments = {key: value for key, value in content.items() if key not in ("_target_", "_partial_", *_SELECTORS)}
    lr, train = arguments.pop("lr", None), arguments.pop("train", True)
    try:
        lr = None if lr is None else float(lr)  # YAML 1.1, which PyYAML reads, takes 1e-4 for a text
    except ValueError as error:
        raise PluginError(f"plugin `{name}`: lr {lr!r} is no number") from error
    selectors = {}
    for key in _SELECTORS:
        value = content.get(key)
        texts = [value] if isinstance(value, str) else value
        if texts is None:
            continue
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise PluginError(f"plugin `{name}`: `{key}` is no list of selectors", hint="write a list of texts")
        selectors[key] = texts
    return PluginEntry(name, content["_target_"], selectors, arguments, lr, bool(train))
