"""Surgery on models: four shapes of plugins that attach to a model, and leave it without trace or become part of it."""

from sdconvert.plugins.base import BasePluginBlock
from sdconvert.plugins.build import build_pipeline_plugins, build_plugins
from sdconvert.plugins.check import require_fused
from sdconvert.plugins.configuration import read_plugin_config
from sdconvert.plugins.container import PatchPluginContainer
from sdconvert.plugins.errors import ExecutionOrderError, PluginNameError
from sdconvert.plugins.feeding import feeding
from sdconvert.plugins.group import PluginGroup
from sdconvert.plugins.loha import LohaBlock
from sdconvert.plugins.lora import LoraBlock
from sdconvert.plugins.lora_attach import attach_lora, fuse_lora
from sdconvert.plugins.multi import MultiPluginBlock
from sdconvert.plugins.pair import PluginBlock
from sdconvert.plugins.patch import PatchPluginBlock
from sdconvert.plugins.selectors import LayerMatch, match_layers
from sdconvert.plugins.single import SinglePluginBlock

__all__ = [
    "BasePluginBlock",
    "ExecutionOrderError",
    "LayerMatch",
    "LohaBlock",
    "LoraBlock",
    "MultiPluginBlock",
    "PatchPluginBlock",
    "PatchPluginContainer",
    "PluginBlock",
    "PluginGroup",
    "PluginNameError",
    "SinglePluginBlock",
    "attach_lora",
    "build_pipeline_plugins",
    "build_plugins",
    "feeding",
    "fuse_lora",
    "match_layers",
    "read_plugin_config",
    "require_fused",
]
