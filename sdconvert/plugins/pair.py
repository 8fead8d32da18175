"""Plugins from one layer to one layer."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from torch import nn

from sdconvert.errors import PluginError
from sdconvert.plugins.errors import ExecutionOrderError
from sdconvert.plugins.group import PluginGroup
from sdconvert.plugins.linked import Layer, LinkedPlugin, located, model_of, paths_of
from sdconvert.plugins.selectors import match_layers


class PluginBlock(LinkedPlugin):
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
        root = model_of([from_layer, to_layer], host_model)
        source, target = located(from_layer, root), located(to_layer, root)
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
                f"from [{paths_of(sources)}] to [{paths_of(targets)}]",
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

    def to_layer_hook(
        self, host: nn.Module, fea_in: tuple[Any, ...], fea_out: Any, fea_kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `forward` on what the from-layer gave.

        Raises:
            ExecutionOrderError: The from-layer has not run in this call.
        """
        if self.feat_from is None:
            raise ExecutionOrderError(
                f"plugin `{self.name}`: layer `{self.to_path}` runs before `{self.from_path}`, which is to feed it",
                hint="exchange the two layers, or choose a from-layer that runs earlier",
            )
        return self._invoke("forward", self.feat_from, fea_in, fea_out, fea_kwargs=fea_kwargs or {})

    def _from_hook(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any, idx: int) -> None:
        if self.enabled and self._in_call:
            self._invoke("from_layer_hook", module, args, output, fea_kwargs=kwargs)

    def _to_hook(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any, idx: int) -> Any:
        if not self.enabled:
            return None
        self._require_call(self.to_path)
        return self._invoke("to_layer_hook", module, args, output, fea_kwargs=kwargs)
