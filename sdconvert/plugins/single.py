"""Plugins on one layer that see its input and output, or stand in for one of its parameters."""

from typing import Any

import torch
from torch import nn

from sdconvert.errors import PluginError
from sdconvert.plugins.base import unwrap
from sdconvert.plugins.hooks import PluginHook
from sdconvert.plugins.wrapping import WrapablePlugin


class SinglePluginBlock(WrapablePlugin):
    """A plugin on one layer.

    Without `hook_param`, `forward(fea_in, fea_out)` gets the tuple of positional inputs and the output of the layer;
    what it returns replaces the output, None keeps it. A forward that also names `fea_kwargs` gets the keyword inputs.

    With `hook_param`, `forward(host_param)` returns what the layer uses as that parameter. During a forward of the
    layer the value lies in the layer's instance `__dict__`, where it shadows the Parameter; so the Parameter is never
    taken away, and keys, order, failing forwards and copies stay right.

    Args:
        name: Of the plugin on its host.
        host: The layer.
        hook_param: Name of a parameter of the layer.
        host_model: Accepted for the guide's sake; a hook on a layer needs no model.

    Raises:
        PluginError: The layer has no such parameter.
    """

    def __init__(
        self, name: str | int, host: nn.Module, hook_param: str | None = None, host_model: nn.Module | None = None
    ) -> None:
        # A container has no parameters of its own: those of a patched layer are in the layer.
        super().__init__(name, unwrap(host) if hook_param else host)
        self.hook_param = hook_param
        if not hook_param:
            self._hook(self.host, "_replace_output", pre=False)
            return
        self._hook(self.host, "_shadow", pre=True)
        self._hook(self.host, "_unshadow", pre=False, always=True)
        if self.host._parameters.get(hook_param) is None:
            has = ", ".join(name for name, value in self.host._parameters.items() if value is not None)
            raise PluginError(
                f"{type(self.host).__name__} has no parameter `{hook_param}`", hint=f"it has: {has or 'none'}"
            )

    def fuse_into_host(self) -> None:
        """Make the parameter's present value permanent.

        Raises:
            PluginError: There is no `hook_param`, or an earlier plugin stands in for the same parameter.
        """
        if self.hook_param is None:
            super().fuse_into_host()
            return
        first = self._first_on_param(self.host)
        if first is not self:
            raise PluginError(
                f"plugin `{self.name}` builds on plugin `{first.name}`, on the same `{self.hook_param}`",
                hint=f"fuse `{first.name}` first",
            )
        param: nn.Parameter = getattr(self.host, self.hook_param)
        with torch.no_grad():
            param.copy_(self(param))

    def _replace_output(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, idx: int
    ) -> Any:
        return self._invoke("forward", args, output, fea_kwargs=kwargs) if self.enabled else None

    def _shadow(self, module: nn.Module, *_: Any) -> None:
        if self._first_on_param(module) is self:
            # An interrupt, unlike an exception, gets past `_unshadow` and leaves the value of an unfinished call.
            self._unshadow(module)
        if self.enabled:
            module.__dict__[str(self.hook_param)] = self(getattr(module, str(self.hook_param)))

    def _unshadow(self, module: nn.Module, *_: Any) -> None:
        module.__dict__.pop(str(self.hook_param), None)

    def _first_on_param(self, module: nn.Module) -> "SinglePluginBlock":
        plugins = [hook.plugin for hook in module._forward_pre_hooks.values() if isinstance(hook, PluginHook)]
        return next(p for p in plugins if isinstance(p, SinglePluginBlock) and p.hook_param == self.hook_param)
