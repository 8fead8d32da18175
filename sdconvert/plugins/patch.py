"""Plugins that take the place of a layer: it moves into a container, and patches run around it or instead of it."""

from typing import Any, ClassVar

from torch import nn

from sdconvert.errors import PluginError
from sdconvert.plugins.base import check_name, unwrap
from sdconvert.plugins.container import PatchPluginContainer
from sdconvert.plugins.selectors import LayerMatch, iter_layers
from sdconvert.plugins.wrapping import WrapablePlugin


class PatchPluginBlock(WrapablePlugin):
    """A plugin that wraps or replaces a layer.

    Args:
        name: Of the plugin in the layer's container.
        host: The layer, or its container.
        host_model: Searched for the layer's place(s) if `parent_block` is not given.
        parent_block: The module whose child the layer is.
        host_name: The layer's name there.

    Attributes:
        container_cls: The container that runs it. A layer that already has a container of exactly this class gets no
            second one; around one of another class a new one is put.

    Raises:
        PluginError: The layer's place is not known.
    """

    container_cls: ClassVar[type[PatchPluginContainer]] = PatchPluginContainer

    def __init__(
        self,
        name: str | int,
        host: nn.Module,
        host_model: nn.Module | None = None,
        parent_block: nn.Module | None = None,
        host_name: str | None = None,
    ) -> None:
        super().__init__(name, host)
        self._slots = _find_slots(host, host_model, parent_block, host_name)

    @property
    def host(self) -> nn.Module:
        """The layer that is patched; during fusing, what earlier patches have made of it."""
        return self._anchor._host if isinstance(self._anchor, PatchPluginContainer) else self._anchor

    def pre_forward(self, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Change what enters the layer: positional and keyword arguments."""
        return args, kwargs

    def post_forward(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        """Change what leaves the layer, given also what entered it."""
        return output

    def patched_module(self) -> nn.Module:
        """The module that does alone what `host` and this patch do together; overridden by patches that can be fused.

        Raises:
            PluginError: This patch cannot.
        """
        raise PluginError(
            f"plugin `{self.name}` ({type(self).__name__}) cannot be fused: it has no module for the layer's place",
            hint="keep it attached, or take it off with remove()",
        )

    def fuse(self) -> None:
        """Replace the container by the patched module, for all patches of the container in order."""
        self._require_attached("fused")
        self._container.fuse()

    def leave(self, module: nn.Module) -> None:
        """Take note that the container is gone and `module` is in its place."""
        self._let_go()
        self._refer(_anchor=module)

    @classmethod
    def place(cls, match: LayerMatch) -> dict[str, Any]:
        """The parent of a layer and its name there."""
        parent, name = _slot(match)
        return {"parent_block": parent, "host_name": name}

    def attach_again(self, match: LayerMatch) -> None:
        """Take the second place too: the layer stays one layer."""
        self._container.occupy(*_slot(match))

    @property
    def _container(self) -> PatchPluginContainer:
        assert isinstance(self._anchor, PatchPluginContainer)  # for the type checker: attached means contained
        return self._anchor

    def _register(self) -> None:
        parent, name = self._slots[0]
        current = parent.get_submodule(name)
        container = current if type(current) is self.container_cls else self.container_cls(current)
        assert isinstance(container, PatchPluginContainer)  # for the type checker
        check_name(self.name, container)
        for slot in self._slots:
            container.occupy(*slot)
        container.add_plugin(self)
        self._slots = []
        self._refer(_anchor=container)

    def _unregister(self) -> None:
        container, layer = self._container, self.host
        container.remove_plugin(self)
        self.leave(layer)


def _find_slots(
    host: nn.Module, host_model: nn.Module | None, parent_block: nn.Module | None, host_name: str | None
) -> list[tuple[nn.Module, str]]:
    """The places of a layer, looked up in the model as it is now: the layer may have got a container meanwhile."""
    layer = unwrap(host)
    if parent_block is not None:
        parent = unwrap(parent_block)
        children = parent._modules if host_name is None else {host_name: parent._modules.get(host_name)}
        slots = [(parent, name) for name, child in children.items() if child is not None and unwrap(child) is layer]
    elif host_model is not None:
        matches = [LayerMatch(path, module, model=host_model) for path, module in iter_layers(host_model)]
        slots = [_slot(match) for match in matches if unwrap(match.module) is layer]
    else:
        slots = []
    if not slots:
        raise PluginError(
            f"the place of the {type(layer).__name__} to patch is not known",
            hint="pass host_model=, or parent_block= and host_name=, of the model that contains it",
        )
    return slots


def _slot(match: LayerMatch) -> tuple[nn.Module, str]:
    assert match.model is not None  # for the type checker: matches of a walk have their model
    parent, _, name = match.path.rpartition(".")
    if not name:
        raise PluginError(
            f"{type(match.module).__name__} is the model itself: a patch needs a parent to put its container into",
            hint="patch its layers, or attach the patch from a module that contains it",
        )
    return unwrap(match.model.get_submodule(parent)), name
