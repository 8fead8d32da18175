"""The hook that every plugin uses: it sees keyword arguments and is copied and pickled with its model."""

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class PluginHook:
    """One hook of one plugin on one module: an object and no lambda, so that it is copied with its model.

    Args:
        plugin: Whose method runs.
        module: On which, once `attach` is called.
        method: Name of a method `(module, args, kwargs, output, idx) -> result`; `output` is None before the forward.
        pre: Run before the module's forward rather than after it.
        idx: Handed to the method.
        always: Run after the forward even if it raised.
        first: Run ahead of the hooks that the module has when this one is attached.
    """

    def __init__(
        self,
        plugin: nn.Module,
        module: nn.Module,
        method: str,
        *,
        pre: bool,
        idx: int = 0,
        always: bool = False,
        first: bool = False,
    ) -> None:
        self.plugin = plugin
        self.module = module
        self.method = method
        self.pre = pre
        self.idx = idx
        self.always = always
        self.first = first
        self._handle: RemovableHandle | None = None

    def attach(self) -> None:
        """Start to run."""
        self._register(prepend=self.first)

    def detach(self) -> None:
        """Stop running."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def move(self, module: nn.Module) -> None:
        """Run on another module from now on."""
        self.detach()
        self.module = module
        self._register(prepend=False)  # whoever moves several hooks does so in the order in which they run

    def _register(self, *, prepend: bool) -> None:
        if self.pre:
            self._handle = self.module.register_forward_pre_hook(self, with_kwargs=True, prepend=prepend)
        else:
            self._handle = self.module.register_forward_hook(
                self, with_kwargs=True, always_call=self.always, prepend=prepend
            )

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> Any:
        """What torch calls."""
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
