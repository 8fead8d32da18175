"""Selectors: how a configuration names the layers of a model.

A selector is a module path (`up_blocks.3`, `''` is the model itself) after any of these prefixes, in any order:

    re:          the path is a regular expression, matched from its left end
    cls(Name):   only modules of that class or of a subclass of it
    pre_hook:    what enters the layer rather than what leaves it (`prehook:` is the same)

Paths are those of the model without its plugins: a patched layer keeps its path, and no plugin's own module has one.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sdconvert.errors import PluginError
from sdconvert.plugins.base import BasePluginBlock, unwrap

_PREFIX = re.compile(r"(re|pre_hook|prehook|cls\((?P<cls>\w+)\)):")
_ANY_PREFIX = re.compile(r"\w+(\([^)]*\))?:")
_KNOWN_PREFIXES = "re:, pre_hook:, prehook:, cls(Name):"


@dataclass(frozen=True)
class LayerMatch:
    """A layer that a selector found; `match["layer"]` and `match["pre_hook"]` also work.

    Attributes:
        path: Module path in `model`.
        module: The layer; its container if it is patched.
        pre_hook: The input of the layer is meant rather than its output.
        model: The model in which it was found.
    """

    path: str
    module: nn.Module
    pre_hook: bool = False
    model: nn.Module | None = field(default=None, repr=False)

    def __getitem__(self, key: str) -> Any:
        return {"layer": self.module, "pre_hook": self.pre_hook}[key]


@dataclass(frozen=True)
class _Selector:
    text: str
    name: str
    regex: bool
    pre_hook: bool
    cls: str | None


def iter_layers(
    model: nn.Module, skip: Callable[[str, nn.Module], bool] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Walk all (path, module) of a model as `named_modules` does, but through containers and past plugins.

    A module that sits at two paths is met at both.

    Args:
        model: Its own path is `''`.
        skip: Says of a path and a layer that the walk stays out of it.
    """
    yield from _walk(model, "", skip)


def _walk(
    module: nn.Module, path: str, skip: Callable[[str, nn.Module], bool] | None
) -> Iterator[tuple[str, nn.Module]]:
    layer = unwrap(module)
    if skip is not None and skip(path, layer):
        return
    yield path, module
    for name, child in list(layer._modules.items()):
        if child is not None and not isinstance(child, BasePluginBlock):
            yield from _walk(child, f"{path}.{name}" if path else name, skip)


def match_layers(selectors: str | Iterable[str], model: nn.Module) -> list[LayerMatch]:
    """Find the layers that selectors name, in the selectors' order, then in the model's; each only once.

    Raises:
        PluginError: A selector has an unknown prefix or a bad regular expression, or matches nothing.
    """
    layers = list(iter_layers(model))
    found: dict[tuple[str, bool], LayerMatch] = {}
    for text in [selectors] if isinstance(selectors, str) else selectors:
        selector = _parse(text)
        for path, module in _select(selector, layers):
            found.setdefault((path, selector.pre_hook), LayerMatch(path, module, selector.pre_hook, model))
    return list(found.values())


def _parse(text: str) -> _Selector:
    rest, flags, cls = text, set(), None
    while prefix := _PREFIX.match(rest):
        cls = prefix["cls"] or cls
        flags.add(prefix[1])
        rest = rest[prefix.end() :]
    if unknown := _ANY_PREFIX.match(rest):
        raise PluginError(
            f"selector `{text}` has an unknown prefix `{unknown[0]}`", hint=f"known prefixes: {_KNOWN_PREFIXES}"
        )
    return _Selector(text, rest, "re" in flags, not flags.isdisjoint({"pre_hook", "prehook"}), cls)


def _select(selector: _Selector, layers: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    if selector.regex:
        try:
            pattern = re.compile(selector.name)
        except re.error as error:
            raise PluginError(f"selector `{selector.text}` is no regular expression: {error}") from error
        named = [(path, module) for path, module in layers if pattern.match(path)]
    else:
        named = [(path, module) for path, module in layers if path == selector.name]
    chosen = [(path, module) for path, module in named if selector.cls is None or selector.cls in class_names(module)]
    if not chosen:
        raise _no_match(selector, named or layers)
    return chosen


def class_names(module: nn.Module) -> list[str]:
    """Names of the layer's class and its base classes, seen through containers."""
    return [cls.__name__ for cls in type(unwrap(module)).__mro__]


def _no_match(selector: _Selector, candidates: list[tuple[str, nn.Module]]) -> PluginError:
    # Without the syntax of a regular expression, what is left of it is close to the names that were meant.
    wanted = re.sub(r"[\\^$*+?()\[\]|]", "", selector.name) if selector.regex else selector.name
    labels = [f"{path} ({type(unwrap(module)).__name__})" if selector.cls else path for path, module in candidates]
    nearest = difflib.get_close_matches(f"{wanted} ({selector.cls})" if selector.cls else wanted, labels, 3, cutoff=0)
    return PluginError(
        f"selector `{selector.text}` matches no layer", hint=f"nearest: {', '.join(f'`{name}`' for name in nearest)}"
    )
