"""What can go wrong with a plugin beyond a plain `PluginError`."""

from sdconvert.errors import PluginError


class PluginNameError(PluginError):
    """A plugin's name is malformed or taken on its host."""


class ExecutionOrderError(PluginError):
    """A plugin needs a feature that its model has not produced in this call."""
