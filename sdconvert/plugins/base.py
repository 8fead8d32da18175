"""What all plugins share: a name on a host, hooks that survive copying, features that live for one call.

A plugin is an `nn.Module` that becomes a child of its host, so its parameters travel in the host's `state_dict`. Every
reference from a plugin back into the model is a plain attribute: ownership stays a tree, while `copy.deepcopy` and
`pickle` of the model carry the references over to the copy.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from sdconvert.errors import PluginError
from sdconvert.plugins.errors import PluginNameError

_HOOK_METHODS = ("forward", "from_layer_hook", "to_layer_hook")


class PluginHook:
    """One hook of one plugin on one module: an object and no lambda, so that it is copied with its model.

    Args:
        plugin: Whose method runs.
        module: On which, once `attach` is called.
        method: Name of a method `(module, args, kwargs, output, idx) -> result`; `output` is None before the forward.
        pre: Run before the module's forward rather than after it.
        idx: Handed to the method.
        always: Run after the forward even if it raised.
    """

    def __init__(
        self,
        plugin: "BasePluginBlock",
        module: nn.Module,
        method: str,
        *,
        pre: bool,
        idx: int = 0,
        always: bool = False,
    ) -> None:
        self.plugin = plugin
        self.module = module
        self.method = method
        self.pre = pre
        self.idx = idx
        self.always = always
        self._handle: RemovableHandle | None = None

    def attach(self) -> None:
        """Start to run."""
        if self.pre:
            self._handle = self.module.register_forward_pre_hook(self, with_kwargs=True)
        else:
            self._handle = self.module.register_forward_hook(self, with_kwargs=True, always_call=self.always)

    def detach(self) -> None:
        """Stop running."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def move(self, module: nn.Module) -> None:
        """Run on another module from now on."""
        self.detach()
        self.module = module
        self.attach()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> Any:
        result = getattr(self.plugin, self.method)(module, args, kwargs, output, self.idx)
        return _as_arguments(result, kwargs) if self.pre and result is not None else result


def _as_arguments(result: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a pre-hook returned, as torch wants it: a value, a tuple of positional arguments, or both kinds."""
    if isinstance(result, tuple):
        match result:
            case (tuple() as args, dict() as changed):
                return args, changed
        return result, kwargs
    return (result,), kwargs


def plugin_hooks(module: nn.Module) -> list[PluginHook]:
    """The hooks that plugins have on `module`, in the order in which they run."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return [hook for hook in hooks if isinstance(hook, PluginHook)]


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
        self._grafts: list[tuple[nn.Module, str, nn.Module]] = []
        self._feeders: list[nn.Module] = []
        self._methods_with_kwargs: frozenset[str] = frozenset()
        self._refer(_anchor=host)

    @property
    def host(self) -> nn.Module:
        """The module that the plugin hangs on."""
        return self._anchor

    def attach(self) -> None:
        """Become part of the model; called once, when the constructor has finished."""
        methods = {name: getattr(self, name, None) for name in _HOOK_METHODS}
        self._methods_with_kwargs = frozenset(
            name for name, method in methods.items() if method and "fea_kwargs" in inspect.signature(method).parameters
        )
        for parent, name, _ in self._grafts:
            check_name(name, parent)
        self._register()
        self.train(self.host.training)
        for parent, name, module in self._grafts:
            parent.add_module(name, module.train(parent.training))
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
        for parent, name, _ in self._grafts:
            del parent._modules[name]
        for hook in self._hooks:
            hook.detach()
        self._hooks.clear()
        for model in self._feeders:
            self._stop_feeding_from(model)
        self._feeders.clear()
        self.attached = False

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
        check_name(self.name, self.host)
        self.host.add_module(self.name, self)

    def _unregister(self) -> None:
        del self.host._modules[self.name]

    def _hook(self, module: nn.Module, method: str, *, pre: bool, idx: int = 0, always: bool = False) -> None:
        """Plan a hook; it runs from attachment on."""
        self._hooks.append(PluginHook(self, module, method, pre=pre, idx=idx, always=always))

    def _graft(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Plan a child for another module than the plugin: for keys that a checkpoint's layout demands there."""
        self._grafts.append((parent, name, module))

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


def move_plugins(old: nn.Module, new: nn.Module) -> None:
    """Carry the plugins and their hooks that sit on `old` over to `new`, which takes its place in the model."""
    for hook in plugin_hooks(old):
        hook.move(new)
    for name, child in list(old._modules.items()):
        if isinstance(child, BasePluginBlock) and child.host is old:
            del old._modules[name]
            check_name(name, new)
            new.add_module(name, child)
            child._refer(_anchor=new)


@contextmanager
def feeding(model: nn.Module, **data: Any) -> Iterator[None]:
    """Hand extra inputs (control image, timestep, ...) to the plugins of `model` for the calls inside the block.

    What a plugin keeps of them is forgotten at the end of the block.

    Raises:
        PluginError: No plugin of the model takes extra inputs.
    """
    feeders = list(getattr(model, "input_feeder", []))
    if not feeders:
        raise PluginError(
            f"no plugin of {type(model).__name__} takes extra inputs ({', '.join(data)})",
            hint="the plugin calls self.register_input_feeder_to(model) in its constructor",
        )
    with ExitStack() as fed:
        for feeder in feeders:
            fed.enter_context(_fed(feeder, data))
        yield


@contextmanager
def _fed(feeder: Any, data: dict[str, Any]) -> Iterator[None]:
    plugin: BasePluginBlock = feeder.__self__
    before = dict(vars(plugin))
    changed: set[str] = set()
    try:
        try:
            feeder(data)
        finally:
            changed = {name for name, value in vars(plugin).items() if name not in before or before[name] is not value}
        yield
    finally:
        for name in changed:
            plugin.__dict__.pop(name, None)
        plugin.__dict__.update({name: before[name] for name in changed & before.keys()})
