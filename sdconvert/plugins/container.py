"""The container of a patched layer: it stands at the layer's place and passes for the layer.

It shows the layer's attributes as its own, and its `state_dict` has the layer's keys, not one renamed; a checkpoint
loads into a patched model as into the plain one.
"""

from typing import TYPE_CHECKING, Any

from torch import nn

from sdconvert.errors import PluginError
from sdconvert.plugins.base import BasePluginBlock, check_child, hanging_on, move_plugins, unwrap
from sdconvert.plugins.hooks import PluginHook, plugin_hooks
from sdconvert.plugins.selectors import iter_layers

if TYPE_CHECKING:
    from sdconvert.plugins.patch import PatchPluginBlock


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
        self.training = host.training

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
            for patch in patches:
                # The next patch finds as its host what this one has made.
                self._modules["_host"] = patch.patched_module()
            fused = self._host
        finally:
            self._modules["_host"] = original
        replaced = original not in set(fused.modules())
        _require_nothing_lost(original, fused)
        for plugin in [*hanging_on(self), *(hanging_on(original) if replaced else [])]:
            check_child(plugin.name, fused)
        if replaced:
            move_plugins(original, fused)
        self._vacate(fused)
        for patch in patches:
            patch.leave(fused)

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


def _require_nothing_lost(original: nn.Module, fused: nn.Module) -> None:
    kept = set(fused.modules())
    for path, module in iter_layers(original):
        plugins = [child for child in module._modules.values() if isinstance(child, BasePluginBlock)]
        if path and module not in kept and (plugins or plugin_hooks(module) or module is not unwrap(module)):
            raise PluginError(
                f"fusing {type(original).__name__} into {type(fused).__name__} would lose the plugins on its `{path}`",
                hint="fuse or remove those first",
            )
