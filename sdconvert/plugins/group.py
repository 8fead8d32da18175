"""A set of plugins that were attached together, by the path of their layer."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sdconvert.errors import PluginError
from sdconvert.plugins.base import BasePluginBlock

_PLACE = "___"
"""Stands for a plugin's name in the keys of a group: what was saved under one name loads under another."""
_SHOWN = 10


class PluginGroup(dict[str, BasePluginBlock]):
    """Plugins by layer path; one plugin may serve several paths.

    Attributes:
        lr: Learning rate that a configuration gives these plugins, for whoever trains them.
    """

    lr: float | None = None

    @property
    def plugins(self) -> list[BasePluginBlock]:
        """Each plugin once, in the order of attachment."""
        return list(dict.fromkeys(self.values()))

    def remove(self) -> None:
        """Take all plugins off, the last attached first.

        Raises:
            PluginError: One of them is not attached; nothing is changed.
        """
        self._require_attached()
        for plugin in reversed(self.plugins):
            plugin.remove()

    def fuse(self) -> None:
        """Fuse all plugins in the order of attachment.

        Raises:
            PluginError: One of them is not attached, or cannot be fused.
        """
        self._require_attached()
        for plugin in self.plugins:
            # Patches of one layer are fused together: the first takes the others along.
            if plugin.attached:
                plugin.fuse()

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The trainable parameters as an optimizer of torch takes them.

        Args:
            lr: Learning rate where the group has none of its own.
        """
        parameters = [p for plugin in self.plugins for p in plugin.parameters() if p.requires_grad]
        return [{"params": parameters, "lr": lr if self.lr is None else self.lr}]

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors of the plugins, under `{path of the layer}.___.{key in the plugin}`.

        Raises:
            PluginError: There is nothing to save.
        """
        for path, plugin in self._places().items():
            if plugin.grafts:
                raise PluginError(
                    f"plugin `{plugin.name}` at `{path}` keeps weights under the model's own keys",
                    hint="save the model's state_dict()",
                )
        state = {self._key(path, key): plugin.state_dict()[key] for path, plugin, key in self._entries()}
        if not state:
            raise PluginError(
                f"a group of {len(self)} plugins has no tensors to save",
                hint="check that the plugins are attached and have parameters",
            )
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True) -> None:
        """Load what `state_dict` gave, whatever the plugins were called then; all of it or nothing.

        Args:
            state: Tensors by key.
            strict: Every key and every tensor of the plugins must find its counterpart; otherwise at least one.

        Raises:
            PluginError: Lists the keys that are missing, unused, or of another shape.
        """
        entries = {self._key(path, key): (plugin, key) for path, plugin, key in self._entries()}
        both = entries.keys() & state.keys()
        shapes = {name: entries[name][0].state_dict()[entries[name][1]].shape for name in both}
        problems = {
            "of another shape": [
                f"{name} is {tuple(state[name].shape)}, not {tuple(shapes[name])}"
                for name in sorted(both)
                if state[name].shape != shapes[name]
            ]
        }
        if strict or not both:
            problems |= {"missing": sorted(entries.keys() - both), "unused": sorted(state.keys() - both)}
        if found := [f"{len(keys)} {what}: {_listed(keys)}" for what, keys in problems.items() if keys]:
            raise PluginError(
                f"the tensors do not fit a group of {len(self)} plugins: {'; '.join(found)}",
                hint=f"keys are {{path of the layer}}.{_PLACE}.{{key in the plugin}}, of plugins of the same settings",
            )
        for plugin in self.plugins:
            own = {key: state[name] for name, (owner, key) in entries.items() if owner is plugin and name in state}
            plugin.load_state_dict(own, strict=strict)

    def _places(self) -> dict[str, BasePluginBlock]:
        """Each plugin once, at its first path."""
        first = {plugin: path for path, plugin in reversed(self.items())}
        return {first[plugin]: plugin for plugin in self.plugins}

    def _entries(self) -> list[tuple[str, BasePluginBlock, str]]:
        return [(path, plugin, key) for path, plugin in self._places().items() for key in plugin.state_dict()]

    @staticmethod
    def _key(path: str, key: str) -> str:
        return f"{path}.{_PLACE}.{key}" if path else f"{_PLACE}.{key}"

    def _require_attached(self) -> None:
        if gone := [path for path, plugin in self.items() if not plugin.attached]:
            raise PluginError(
                f"{len(gone)} of {len(self)} plugins are not attached any more, the first at `{gone[0]}`",
                hint="they have been removed or fused already",
            )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
