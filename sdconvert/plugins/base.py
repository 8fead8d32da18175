"""What all plugins share: a name on a host, hooks, and that nothing is left when they go.

A plugin is an `nn.Module` that becomes a child of its host, so its parameters travel in the host's `state_dict`. Every
reference from a plugin back into the model is a plain attribute: ownership stays a tree, while `copy.deepcopy` and
`pickle` of the model carry the references over to the copy.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sdconvert.errors import PluginError
from sdconvert.plugins.errors import PluginNameError
from sdconvert.plugins.hooks import PluginHook, plugin_hooks

_HOOK_METHODS = ("forward", "from_layer_hook", "to_layer_hook")


class _AttachWhenBuilt(type):
    """Attach a plugin once its whole constructor has run: one that raises leaves the model untouched."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        plugin = super().__call__(*args, **kwargs)
        plugin.attach()
        return plugin


class BasePluginBlock(nn.Module, metaclass=_AttachWhenBuilt):
    """A named addition to a model, attached by construction and taken off by `remove` or `fuse`.

    Args:
        name: Under which the plugin becomes a child of its host; no dot, and free on the host.
        host: The module that the plugin hangs on.

    Raises:
        PluginNameError: The name is malformed or taken.
    """

    _anchor: nn.Module

    def __init__(self, name: str | int, host: nn.Module) -> None:
        super().__init__()
        self.name = str(name)
        self.enabled = True
        self.attached = False
        self._hooks: list[PluginHook] = []
        self._planned_grafts: list[tuple[nn.Module, str, nn.Module]] = []
        self._grafts: list[tuple[nn.Module, str]] = []
        self._feeders: list[nn.Module] = []
        self._methods_with_kwargs: frozenset[str] = frozenset()
        self._refer(_anchor=host)

    @property
    def host(self) -> nn.Module:
        """The module that the plugin hangs on."""
        return self._anchor

    @property
    def grafts(self) -> list[tuple[nn.Module, str]]:
        """The children that the plugin has given to other modules of the model: (parent, name)."""
        return list(self._grafts)

    def attach(self) -> None:
        """Become part of the model; called once, when the constructor has finished."""
        methods = {name: getattr(self, name, None) for name in _HOOK_METHODS}
        self._methods_with_kwargs = frozenset(
            name for name, method in methods.items() if method and "fea_kwargs" in inspect.signature(method).parameters
        )
        for parent, name, _ in self._planned_grafts:
            check_name(name, parent)
        self._register()
        self.train(self.host.training)
        for parent, name, module in self._planned_grafts:
            parent.add_module(name, module.train(parent.training))
            self._grafts.append((parent, name))
        self._planned_grafts.clear()
        for hook in self._hooks:
            hook.attach()
        self.attached = True
        for model in self._feeders:
            self._feed_from(model)

    def remove(self) -> None:
        """Take the plugin off; the model is again what it was.

        Raises:
            PluginError: It is not attached.
        """
        self._require_attached("removed")
        self._unregister()
        self._let_go()

    def fuse(self) -> None:
        """Write the plugin's effect into the host for good, and take the plugin off.

        Raises:
            PluginError: It is not attached, or its effect cannot be written into the host.
        """
        self._require_attached("fused")
        self.fuse_into_host()
        self.remove()

    def fuse_into_host(self) -> None:
        """Write the effect into the host; overridden by plugins that can.

        Raises:
            PluginError: This plugin cannot.
        """
        raise PluginError(
            f"plugin `{self.name}` ({type(self).__name__}) cannot be fused: its effect is no change of its host",
            hint="keep it attached, or take it off with remove()",
        )

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the model as if the plugin were not there."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def feed_input_data(self, data: Any) -> None:
        """Receive what `feeding(model, **data)` was given; by default it is kept as `input_data`."""
        self.input_data = data

    def register_input_feeder_to(self, host_model: nn.Module) -> None:
        """Have `feed_input_data` called by `feeding(host_model, ...)`."""
        self._feeders.append(host_model)
        if self.attached:
            self._feed_from(host_model)

    def _refer(self, **modules: nn.Module) -> None:
        """Keep modules as plain attributes: `nn.Module.__setattr__` would make them children."""
        self.__dict__.update(modules)

    def _register(self) -> None:
        check_child(self.name, self.host)
        self.host.add_module(self.name, self)

    def _unregister(self) -> None:
        del self.host._modules[self.name]

    def _let_go(self) -> None:
        """Take back all that the plugin has outside its own place."""
        for parent, name in self._grafts:
            del parent._modules[name]
        for hook in self._hooks:
            hook.detach()
        for model in self._feeders:
            self._stop_feeding_from(model)
        for held in (self._grafts, self._hooks, self._feeders):
            held.clear()
        self.attached = False

    def _hook(
        self, module: nn.Module, method: str, *, pre: bool, idx: int = 0, always: bool = False, first: bool = False
    ) -> None:
        """Plan a hook; it runs from attachment on, with `first` ahead of those that the module has by then."""
        hook = PluginHook(self, module, method, pre=pre, idx=idx, always=always, first=first)
        # Each takes the head of the queue, so the last to be attached is the first to run.
        self._hooks.insert(0 if first else len(self._hooks), hook)

    def _graft(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Plan a child for another module than the plugin: for keys that a checkpoint's layout demands there."""
        self._planned_grafts.append((parent, name, module))

    def _invoke(self, method: str, *args: Any, fea_kwargs: dict[str, Any]) -> Any:
        """Call one of the plugin's own methods, with keyword arguments only if it names them."""
        extra = {"fea_kwargs": fea_kwargs} if method in self._methods_with_kwargs else {}
        return (self if method == "forward" else getattr(self, method))(*args, **extra)

    def _feed_from(self, model: nn.Module) -> None:
        vars(model).setdefault("input_feeder", []).append(self.feed_input_data)

    def _stop_feeding_from(self, model: nn.Module) -> None:
        feeders = vars(model)["input_feeder"]
        feeders.remove(self.feed_input_data)
        if not feeders:
            del model.input_feeder

    def _require_attached(self, what: str) -> None:
        if not self.attached:
            raise PluginError(
                f"plugin `{self.name}` ({type(self).__name__}) cannot be {what}: it is not attached",
                hint="it has been removed or fused already",
            )


def unwrap(module: nn.Module) -> nn.Module:
    """The layer inside its patch containers, if it has any."""
    while "_host" in module._modules:
        module = module.get_submodule("_host")
    return module


def check_name(name: str, host: nn.Module) -> None:
    """Refuse a plugin name that would shadow something on the host or make keys ambiguous.

    Raises:
        PluginNameError: Says what the name collides with.
    """
    if not name or "." in name:
        raise PluginNameError(f"`{name}` is no name for a plugin", hint="use a non-empty name without dots")
    if hasattr(host, name):
        kind = type(getattr(host, name)).__name__
        raise PluginNameError(
            f"`{name}` is taken on {type(host).__name__}: it is a {kind} there", hint="choose another name"
        )


def check_child(name: str, host: nn.Module) -> None:
    """Refuse a plugin as a child of `host` for its name, or because the host runs its children one after another.

    Raises:
        PluginError: Says which.
    """
    layer = unwrap(host)
    if isinstance(layer, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise PluginError(
            f"plugin `{name}` cannot be a child of a {type(layer).__name__}, which takes every child for one of its "
            "layers",
            hint="attach it to one of the layers or to the module around them; a PatchPluginBlock works here too",
        )
    check_name(name, host)


def hanging_on(host: nn.Module) -> list[BasePluginBlock]:
    """The plugins that are children of `host` and hang on it."""
    children = host._modules.values()
    return [child for child in children if isinstance(child, BasePluginBlock) and child.host is host]


def move_plugins(old: nn.Module, new: nn.Module) -> None:
    """Carry the plugins and their hooks that sit on `old` over to `new`, which takes its place in the model."""
    for hook in plugin_hooks(old):
        hook.move(new)
    for plugin in hanging_on(old):
        del old._modules[plugin.name]
        new.add_module(plugin.name, plugin)
        plugin._refer(_anchor=new)
