"""Plugins that carry features from some layers of a model to others: one to one, or many to many.

A feature lives for one call of the host model: when the model's forward begins and when it ends (also by an
exception), the plugin forgets every tensor that it has put into a plain attribute of its own since. What is to last
belongs into buffers.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from sdconvert.errors import PluginError
from sdconvert.plugins.base import BasePluginBlock
from sdconvert.plugins.errors import ExecutionOrderError
from sdconvert.plugins.group import PluginGroup
from sdconvert.plugins.selectors import LayerMatch, iter_layers, match_layers

Layer = LayerMatch | Mapping[str, Any]

# A plugin's attributes that no call may change: torch's own, and the way back into the model.
_LASTING = frozenset({*vars(nn.Module()), "_anchor", "host_model", "_hooks", "_feeders", "_before_call"})


class _LinkedPlugin(BasePluginBlock):
    """What both shapes share: the host model's call as the scope of features."""

    host_model: nn.Module

    def __init__(self, name: str | int, host: nn.Module, host_model: nn.Module) -> None:
        super().__init__(name, host)
        self._refer(host_model=host_model)

    def reduce(self, earlier: Any, later: Any) -> Any:
        """Combine what a from-layer gave when it runs twice in one call; by default the later one wins."""
        return later

    def _link(self, links: Iterable[tuple[LayerMatch, str, int]]) -> None:
        """Plan the hooks of (layer, method, idx) inside the scope of one call."""
        self._hook(self.host_model, "_begin_call", pre=True)
        for layer, method, idx in links:
            self._hook(layer.module, method, pre=layer.pre_hook, idx=idx)
        self._hook(self.host_model, "_end_call", pre=False, always=True)

    def _begin_call(self, *_: Any) -> None:
        self._end_call()
        self._before_call = {
            name: (value, copy.copy(value) if isinstance(value, dict | list | set) else value)
            for name, value in vars(self).items()
            if name not in _LASTING
        }

    def _end_call(self, *_: Any) -> None:
        before = vars(self).pop("_before_call", {})
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


class PluginBlock(_LinkedPlugin):
    """A plugin from one layer to one layer.

    `forward(fea_from_in, fea_in, fea_out)` gets the from-layer's positional inputs and the to-layer's positional
    inputs and output; its result replaces the to-layer's output or, for a `pre_hook:` layer (`fea_out` is None), its
    inputs. The plugin is registered on the from-layer.

    Args:
        name: Of the plugin on the from-layer.
        from_layer: From `match_layers`, or `{"layer": module, "pre_hook": bool}`.
        to_layer: Likewise.
        host_model: Whose call is the scope of the feature; a `LayerMatch` brings it along.

    Raises:
        PluginError: The model is not known, or does not contain a layer.
    """

    def __init__(
        self, name: str | int, from_layer: Layer, to_layer: Layer, host_model: nn.Module | None = None
    ) -> None:
        root = _model_of([from_layer, to_layer], host_model)
        source, target = _located(from_layer, root), _located(to_layer, root)
        super().__init__(name, source.module, root)
        self.from_path, self.to_path = source.path, target.path
        self.feat_from: Any = None
        self._link([(source, "_from_hook", 0), (target, "_to_hook", 0)])

    @classmethod
    def wrap_model(
        cls,
        name: str | int,
        model: nn.Module,
        from_layer: str | Iterable[str],
        to_layer: str | Iterable[str],
        **kwargs: Any,
    ) -> PluginGroup:
        """Attach one plugin to each pair of the layers that the selectors find, in their order, or none at all.

        Raises:
            PluginError: The selectors find unequal numbers of layers.
        """
        sources, targets = (match_layers(from_layer, model), match_layers(to_layer, model))
        if len(sources) != len(targets):
            raise PluginError(
                f"{cls.__name__} pairs from-layers with to-layers, but there are {len(sources)} and {len(targets)}: "
                f"from [{_paths(sources)}] to [{_paths(targets)}]",
                hint="change the selectors so that both find as many",
            )
        group = PluginGroup()
        with ExitStack() as undo:
            for source, target in zip(sources, targets, strict=True):
                group[source.path] = cls(name, source, target, **kwargs)
                undo.callback(group[source.path].remove)
            undo.pop_all()
        return group

    def from_layer_hook(self, host: nn.Module, fea_in: tuple[Any, ...], fea_out: Any) -> None:
        """Keep the from-layer's positional inputs."""
        self.feat_from = fea_in if self.feat_from is None else self.reduce(self.feat_from, fea_in)

    def to_layer_hook(self, host: nn.Module, fea_in: tuple[Any, ...], fea_out: Any, fea_kwargs: dict[str, Any]) -> Any:
        """Run `forward` on what the from-layer gave.

        Raises:
            ExecutionOrderError: The from-layer has not run in this call.
        """
        if self.feat_from is None:
            raise ExecutionOrderError(
                f"plugin `{self.name}`: layer `{self.to_path}` runs before `{self.from_path}`, which is to feed it",
                hint="exchange the two layers, or choose a from-layer that runs earlier",
            )
        return self._invoke("forward", self.feat_from, fea_in, fea_out, fea_kwargs=fea_kwargs)

    def _from_hook(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any, idx: int) -> None:
        if self.enabled and self._in_call:
            self._invoke("from_layer_hook", module, args, output, fea_kwargs=kwargs)

    def _to_hook(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any, idx: int) -> Any:
        if not self.enabled:
            return None
        self._require_call(self.to_path)
        return self._invoke("to_layer_hook", module, args, output, fea_kwargs=kwargs)


class MultiPluginBlock(_LinkedPlugin):
    """A plugin from several layers to several layers, registered on the host model.

    By default `forward` gets the list of the from-layers' positional inputs once all of them have run, and returns a
    feature for each to-layer, which is added to its output (to its first input for a `pre_hook:` layer). Override
    `from_layer_hook` and `to_layer_hook` for anything else.

    Args:
        name: Of the plugin on the host model.
        from_layers: From `match_layers`, or `{"layer": module, "pre_hook": bool}` each.
        to_layers: Likewise.
        host_model: Whose call is the scope of the features.

    Raises:
        PluginError: The model is not known, or does not contain a layer.
    """

    def __init__(
        self,
        name: str | int,
        from_layers: Sequence[Layer],
        to_layers: Sequence[Layer],
        host_model: nn.Module | None = None,
    ) -> None:
        root = _model_of([*from_layers, *to_layers], host_model)
        super().__init__(name, root, root)
        sources = [_located(layer, root) for layer in from_layers]
        targets = [_located(layer, root) for layer in to_layers]
        self.from_paths, self.to_paths = ([layer.path for layer in layers] for layers in (sources, targets))
        self.feat_from: dict[int, Any] = {}
        self.feat_to: Any = None
        self._link(
            [(layer, "_from_hook", idx) for idx, layer in enumerate(sources)]
            + [(layer, "_to_hook", idx) for idx, layer in enumerate(targets)]
        )

    @classmethod
    def wrap_model(
        cls,
        name: str | int,
        model: nn.Module,
        from_layers: str | Iterable[str],
        to_layers: str | Iterable[str],
        **kwargs: Any,
    ) -> PluginGroup:
        """Attach one plugin to all the layers that the selectors find."""
        sources, targets = (match_layers(from_layers, model), match_layers(to_layers, model))
        return PluginGroup({"": cls(name, sources, targets, host_model=model, **kwargs)})

    def from_layer_hook(self, host: nn.Module, fea_in: tuple[Any, ...], fea_out: Any, idx: int) -> None:
        """Keep the positional inputs of from-layer `idx`; run `forward` when all from-layers have given theirs."""
        self.feat_from[idx] = self.reduce(self.feat_from[idx], fea_in) if idx in self.feat_from else fea_in
        if len(self.feat_from) == len(self.from_paths):
            self.feat_to = self([self.feat_from[key] for key in sorted(self.feat_from)])

    def to_layer_hook(self, host: nn.Module, fea_in: tuple[Any, ...], fea_out: Any, idx: int) -> Any:
        """Add feature `idx` to what leaves or enters to-layer `idx`.

        Raises:
            ExecutionOrderError: A from-layer has not run in this call.
        """
        if self.feat_to is None:
            missing = [path for key, path in enumerate(self.from_paths) if key not in self.feat_from]
            raise ExecutionOrderError(
                f"plugin `{self.name}`: layer `{self.to_paths[idx]}` runs before "
                f"{', '.join(f'`{path}`' for path in missing)}, which is to feed it",
                hint="exchange the layers, or choose from-layers that run earlier",
            )
        if fea_out is None:
            return (fea_in[0] + self.feat_to[idx], *fea_in[1:])
        return fea_out + self.feat_to[idx]

    def _from_hook(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any, idx: int) -> Any:
        if not (self.enabled and self._in_call):
            return None
        return self._invoke("from_layer_hook", module, args, output, idx, fea_kwargs=kwargs)

    def _to_hook(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any, idx: int) -> Any:
        if not self.enabled:
            return None
        self._require_call(self.to_paths[idx])
        return self._invoke("to_layer_hook", module, args, output, idx, fea_kwargs=kwargs)


def _model_of(layers: Sequence[Layer], host_model: nn.Module | None) -> nn.Module:
    found = (layer.model for layer in layers if isinstance(layer, LayerMatch))
    model = host_model if host_model is not None else next(found, None)
    if model is None:
        raise PluginError(
            "the plugin does not know whose call its features live in",
            hint="pass host_model=, or take the layers from match_layers(selectors, model)",
        )
    return model


def _located(layer: Layer, model: nn.Module) -> LayerMatch:
    module: nn.Module = layer["layer"]
    for path, candidate in iter_layers(model):
        if candidate is module:
            return LayerMatch(path, module, bool(layer["pre_hook"]), model)
    raise PluginError(
        f"{type(model).__name__} contains no such {type(module).__name__}",
        hint="find layers in the model itself: match_layers(selectors, model)",
    )


def _paths(layers: Sequence[LayerMatch]) -> str:
    return ", ".join(f"`{'pre_hook:' if layer.pre_hook else ''}{layer.path}`" for layer in layers)
