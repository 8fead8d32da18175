"""Plugins from several layers to several layers."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from sdconvert.plugins.errors import ExecutionOrderError
from sdconvert.plugins.group import PluginGroup
from sdconvert.plugins.linked import Layer, LinkedPlugin, located, model_of
from sdconvert.plugins.selectors import match_layers


class MultiPluginBlock(LinkedPlugin):
    """A plugin from several layers to several layers, registered on the host model.

    By default `forward` gets the list of the from-layers' positional inputs once all of them have run, and returns a
    feature for each to-layer, which is added to its output (to its first input for a `pre_hook:` layer). Override
    `from_layer_hook` and `to_layer_hook` for anything else.

    Args:
        name: Of the plugin on the host model.
        from_layers: From `match_layers`, or `{"layer": module, "pre_hook": bool}` each.
        to_layers: Likewise.
        host_model: Whose call is the scope of the features.
        first: Meet inputs ahead of the plugins that are there already, so that they see what this one makes of them.

    Raises:
        PluginError: The model is not known, or does not contain a layer.
    """

    def __init__(
        self,
        name: str | int,
        from_layers: Sequence[Layer],
        to_layers: Sequence[Layer],
        host_model: nn.Module | None = None,
        *,
        first: bool = False,
    ) -> None:
        root = model_of([*from_layers, *to_layers], host_model)
        super().__init__(name, root, root)
        sources = [located(layer, root) for layer in from_layers]
        targets = [located(layer, root) for layer in to_layers]
        self.from_paths, self.to_paths = ([layer.path for layer in layers] for layers in (sources, targets))
        self.feat_from: dict[int, Any] = {}
        self.feat_to: Any = None
        self._link(
            [(layer, "_from_hook", idx) for idx, layer in enumerate(sources)]
            + [(layer, "_to_hook", idx) for idx, layer in enumerate(targets)],
            first=first,
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
