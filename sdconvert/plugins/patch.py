"""Plugins that take the place of a layer: the layer moves into a container, and patches run around it or instead of it.

The container shows the layer's attributes as its own, and its `state_dict` has the layer's keys, not one renamed; a
checkpoint loads into a patched model as into the plain one.
"""

from typing import Any, ClassVar

from torch import nn

from sdconvert.errors import PluginError
from sdconvert.plugins.base import BasePluginBlock, PluginHook, check_name, move_plugins, plugin_hooks
from sdconvert.plugins.selectors import LayerMatch, iter_layers, unwrap
from sdconvert.plugins.wrapping import WrapablePlugin


class PatchPluginContainer(nn.Module):
    """Holds a layer and its patches at the layer's place in the model.

    Its forward is every `pre_forward` in order, the layer, every `post_forward` in order; subclasses may do without
    the layer.

    Args:
        host: The layer, possibly a container of another class.

    Attributes:
        plugin_names: The patches, in the order of attachment; each is an attribute of that name.
    """

    _host: nn.Module

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self._host = host
        self.plugin_names: list[str] = []
        self._slots: list[tuple[nn.Module, str]] = []
        self.train(host.training)

    @property
    def plugins(self) -> list["PatchPluginBlock"]:
        """The patches, in the order of attachment."""
        return [getattr(self, name) for name in self.plugin_names]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer between the patches."""
        plugins = [plugin for plugin in self.plugins if plugin.enabled]
        for plugin in plugins:
            args, kwargs = plugin.pre_forward(*args, **kwargs)
        output = self._host(*args, **kwargs)
        for plugin in plugins:
            output = plugin.post_forward(output, *args, **kwargs)
        return output

    def occupy(self, parent: nn.Module, name: str) -> None:
        """Take a place in the model; the order of the parent's children stays."""
        if parent._modules[name] is self:
            return
        parent._modules[name] = self
        self._slots.append((parent, name))
        if isinstance(self._host, PatchPluginContainer):
            # The inner container now sits in this one and nowhere else.
            self._host._slots = [(self, "_host")]

    def add_plugin(self, plugin: "PatchPluginBlock") -> None:
        """Append a patch."""
        self.add_module(plugin.name, plugin)
        self.plugin_names.append(plugin.name)

    def remove_plugin(self, plugin: "PatchPluginBlock") -> None:
        """Drop a patch; the last one's leave brings the layer back to its place."""
        if len(self.plugin_names) == 1:
            self._require_own_hooks()
        self.plugin_names.remove(plugin.name)
        del self._modules[plugin.name]
        if not self.plugin_names:
            self._vacate(self._host)

    def fuse(self) -> None:
        """Put the module that the patches make of the layer in its place, in the order of attachment.

        Plugins on the layer move to the new module.

        Raises:
            PluginError: A patch cannot be fused, or a plugin or hook would be lost.
        """
        self._require_own_hooks()
        if isinstance(self._host, PatchPluginContainer):
            raise PluginError(
                f"plugin `{self.plugin_names[0]}` patches a layer that has other patches inside "
                f"({', '.join(self._host.plugin_names)})",
                hint="fuse or remove those first",
            )
        original, patches = self._host, self.plugins
        try:
            for plugin in patches:
                # The next patch finds as its host what this one has made.
                self._modules["_host"] = plugin.patched_module()
            fused = self._host
        finally:
            self._modules["_host"] = original
        _require_nothing_lost(original, fused)
        if fused is not original:
            move_plugins(original, fused)
        self._vacate(fused)
        for plugin in patches:
            plugin.leave(fused)

    def _vacate(self, module: nn.Module) -> None:
        for parent, name in self._slots:
            parent._modules[name] = module
        if isinstance(module, PatchPluginContainer):
            module._slots = self._slots
        self._slots = []
        move_plugins(self, module)

    def _require_own_hooks(self) -> None:
        foreign = [*self._forward_pre_hooks.values(), *self._forward_hooks.values()]
        if any(not isinstance(hook, PluginHook) for hook in foreign):
            raise PluginError(
                f"a patched {type(unwrap(self)).__name__} carries a hook that is no plugin's and would be lost",
                hint="remove the hook first",
            )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            host = self.__dict__.get("_modules", {}).get("_host")
            if host is None:
                raise
            return getattr(host, name)

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The layer's state under the layer's own keys, then each patch's under its name."""
        destination = self._host.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        for name, child in self._modules.items():
            if name != "_host" and child is not None:
                child.state_dict(destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars)
        return destination

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            rest = key.removeprefix(prefix)
            if rest.partition(".")[0] not in self._modules:
                state_dict[f"{prefix}_host.{rest}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


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
        self.attached = False
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
        check_name(self.name, current)
        container = current if type(current) is self.container_cls else self.container_cls(current)
        assert isinstance(container, PatchPluginContainer)  # for the type checker
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


def _require_nothing_lost(original: nn.Module, fused: nn.Module) -> None:
    kept = set(fused.modules())
    for path, module in iter_layers(original):
        plugins = [child for child in module._modules.values() if isinstance(child, BasePluginBlock)]
        if path and module not in kept and (plugins or plugin_hooks(module) or module is not unwrap(module)):
            raise PluginError(
                f"fusing {type(original).__name__} into {type(fused).__name__} would lose the plugins on its `{path}`",
                hint="fuse or remove those first",
            )
