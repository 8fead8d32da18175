"""What plugins share that carry features from some layers of a model to others.

A feature lives for one call of the host model: when the model's forward begins and when it ends (also by an
exception), the plugin forgets every tensor that it has put into a plain attribute of its own since. What is to last
belongs into buffers.
"""

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sdconvert.errors import PluginError
from sdconvert.plugins.base import BasePluginBlock, unwrap
from sdconvert.plugins.errors import ExecutionOrderError
from sdconvert.plugins.selectors import LayerMatch, iter_layers

Layer = LayerMatch | Mapping[str, Any]

# A plugin's attributes that no call may change: torch's own, and the way back into the model.
_LASTING = frozenset({*vars(nn.Module()), "_anchor", "host_model", "_hooks", "_feeders", "_before_call"})


class LinkedPlugin(BasePluginBlock):
    """What both shapes share: the host model's call as the scope of features."""

    host_model: nn.Module

    def __init__(self, name: str | int, host: nn.Module, host_model: nn.Module) -> None:
        super().__init__(name, host)
        self._refer(host_model=host_model)

    def reduce(self, earlier: Any, later: Any) -> Any:
        """Combine what a from-layer gave when it runs twice in one call; by default the later one wins."""
        return later

    def _link(self, links: Iterable[tuple[LayerMatch, str, int]], *, first: bool = False) -> None:
        """Plan the hooks of (layer, method, idx) inside the scope of one call; see `_hook` for `first`."""
        self._hook(self.host_model, "_begin_call", pre=True, first=first)
        for layer, method, idx in links:
            self._hook(layer.module, method, pre=layer.pre_hook, idx=idx, first=first and layer.pre_hook)
        self._hook(self.host_model, "_end_call", pre=False, always=True)

    def _begin_call(self, *_: Any) -> None:
        self._end_call()
        self._before_call = {
            name: (value, copy.copy(value) if isinstance(value, dict | list | set) else value)
            for name, value in vars(self).items()
            if name not in _LASTING
        }

    def _end_call(self, *_: Any) -> None:
        before = vars(self).pop("_before_call", None)
        if before is None:
            return  # what is there was fed, or set by hand, before the call
        for name, value in list(vars(self).items()):
            if name in _LASTING or not holds_tensor(value):
                continue
            if name not in before:
                del self.__dict__[name]
                continue
            original, content = before[name]
            if isinstance(original, dict | set):
                original.clear()
                original.update(content)
            elif isinstance(original, list):
                original[:] = content
            self.__dict__[name] = original

    @property
    def _in_call(self) -> bool:
        return "_before_call" in vars(self)

    def _require_call(self, path: str) -> None:
        if not self._in_call:
            raise ExecutionOrderError(
                f"layer `{path}` runs outside a call of {type(self.host_model).__name__}, so plugin `{self.name}` "
                "has nothing to give it",
                hint="call the whole model, or run the layer inside `with plugin.disabled():`",
            )


def holds_tensor(value: Any) -> bool:
    """Whether a value is a tensor or a nest of containers with one in it."""
    if isinstance(value, Mapping):
        return any(map(holds_tensor, value.values()))
    if isinstance(value, list | tuple | set):
        return any(map(holds_tensor, value))
    return isinstance(value, Tensor)


def model_of(layers: Sequence[Layer], host_model: nn.Module | None) -> nn.Module:
    """The model that layers belong to: the one given, or the one in which they were found.

    Raises:
        PluginError: Neither is there.
    """
    found = (layer.model for layer in layers if isinstance(layer, LayerMatch))
    model = host_model if host_model is not None else next(found, None)
    if model is None:
        raise PluginError(
            "the plugin does not know whose call its features live in",
            hint="pass host_model=, or take the layers from match_layers(selectors, model)",
        )
    return model


def located(layer: Layer, model: nn.Module) -> LayerMatch:
    """A layer as `model` has it now: with its path, and in its container if it has got one meanwhile.

    A layer that was found in this model is looked up at its path; only another one takes a search of the whole model.

    Raises:
        PluginError: The model does not contain it.
    """
    module = unwrap(layer["layer"])
    known = [(layer.path, _at(layer.path, model))] if isinstance(layer, LayerMatch) and layer.model is model else []
    for path, candidate in itertools.chain(known, iter_layers(model)):
        if candidate is not None and unwrap(candidate) is module:
            return LayerMatch(path, candidate, bool(layer["pre_hook"]), model)
    raise PluginError(
        f"{type(model).__name__} contains no such {type(module).__name__}",
        hint="find layers in the model itself: match_layers(selectors, model)",
    )


def _at(path: str, model: nn.Module) -> nn.Module | None:
    """The module at a path of the model without its plugins; None if there is none."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = unwrap(module)._modules.get(name) if module is not None else None
    return module


def paths_of(layers: Sequence[LayerMatch]) -> str:
    """Layers as a message shows them."""
    return ", ".join(f"`{'pre_hook:' if layer.pre_hook else ''}{layer.path}`" for layer in layers)
