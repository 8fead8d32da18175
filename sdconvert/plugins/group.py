"""A set of plugins that were attached together, by the path of their layer."""

from sdconvert.errors import PluginError
from sdconvert.plugins.base import BasePluginBlock


class PluginGroup(dict[str, BasePluginBlock]):
    """Plugins by layer path; one plugin may serve several paths."""

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

    def _require_attached(self) -> None:
        if gone := [path for path, plugin in self.items() if not plugin.attached]:
            raise PluginError(
                f"{len(gone)} of {len(self)} plugins are not attached any more, the first at `{gone[0]}`",
                hint="they have been removed or fused already",
            )
