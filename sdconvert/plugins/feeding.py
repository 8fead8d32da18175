"""Extra inputs for plugins (control image, timestep, ...) besides what their layers are called with."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from sdconvert.errors import PluginError


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
    plugin: nn.Module = feeder.__self__
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
