"""Attach a plugin to every layer of a class: `wrap_model`, for the plugin shapes that hang on one layer."""

import re
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, ClassVar, Self

from torch import nn

from sdconvert.errors import PluginError
from sdconvert.plugins.base import BasePluginBlock, unwrap
from sdconvert.plugins.group import PluginGroup
from sdconvert.plugins.selectors import LayerMatch, iter_layers


class WrapablePlugin(BasePluginBlock):
    """A plugin that hangs on one layer.

    Attributes:
        wrapable_classes: The classes of layers that `wrap_model` attaches to; list or tuple.
    """

    wrapable_classes: ClassVar[Iterable[type[nn.Module]]] = ()

    @classmethod
    def wrap_layer(cls, name: str | int, layer: nn.Module, **kwargs: Any) -> Self:
        """Attach to one layer; keyword arguments go to the constructor."""
        return cls(name, layer, **kwargs)

    @classmethod
    def wrap_model(
        cls,
        name: str | int,
        model: nn.Module,
        exclude_key: str | None = None,
        exclude_classes: Iterable[type[nn.Module]] = (),
        **kwargs: Any,
    ) -> PluginGroup:
        """Attach to every layer of `wrapable_classes`, or to none if one of them fails.

        Plugins are never entered; a layer that sits at two paths gets one plugin, listed under both.

        Args:
            name: Of each plugin on its layer.
            model: Searched with all its submodules, itself included.
            exclude_key: Regular expression; a path in which it is found is skipped, with all below it.
            exclude_classes: Classes that are skipped, with all below them.
            kwargs: For the constructor.

        Returns:
            Plugins by layer path.

        Raises:
            PluginError: No layer matches.
        """
        matches = cls.find_layers(model, exclude_key, exclude_classes)
        layers = [unwrap(match.module) for match in matches]
        plugins: dict[nn.Module, WrapablePlugin] = {}
        with ExitStack() as undo:
            for match, layer in zip(matches, layers, strict=True):
                if layer in plugins:
                    plugins[layer].attach_again(match)
                else:
                    plugins[layer] = cls.wrap_layer(name, match.module, **cls.place(match), **kwargs)
                    undo.callback(plugins[layer].remove)
            undo.pop_all()
        return PluginGroup({match.path: plugins[layer] for match, layer in zip(matches, layers, strict=True)})

    @classmethod
    def find_layers(
        cls, model: nn.Module, exclude_key: str | None = None, exclude_classes: Iterable[type[nn.Module]] = ()
    ) -> list[LayerMatch]:
        """The layers that `wrap_model` attaches to.

        Raises:
            PluginError: There are none.
        """
        excluded, wanted = tuple(exclude_classes), tuple(cls.wrapable_classes)

        def skip(path: str, layer: nn.Module) -> bool:
            return isinstance(layer, excluded) or (exclude_key is not None and bool(re.search(exclude_key, path)))

        layers = iter_layers(model, skip)
        matches = [
            LayerMatch(path, module, model=model) for path, module in layers if isinstance(unwrap(module), wanted)
        ]
        if not matches:
            names = ", ".join(wrapable.__name__ for wrapable in wanted) or "nothing, its wrapable_classes is empty"
            raise PluginError(
                f"{cls.__name__} finds no layer in {type(model).__name__} to attach to; it looks for {names}",
                hint="check the classes of the model's layers, exclude_key and exclude_classes",
            )
        return matches

    @classmethod
    def place(cls, match: LayerMatch) -> dict[str, Any]:
        """Further constructor arguments that say where a layer is; by default none are needed."""
        return {}

    def attach_again(self, match: LayerMatch) -> None:
        """Take note of a second path of the layer; a hook on the layer itself serves them all."""
