"""The question that every consumer of finished weights asks first: is there anything left to fuse?"""

from torch import nn

from sdconvert.errors import PluginError
from sdconvert.plugins.container import PatchPluginContainer
from sdconvert.plugins.single import SinglePluginBlock


def require_fused(model: nn.Module) -> None:
    """Refuse a model whose state_dict is not yet what its forward computes with.

    Plugins that only add to the graph (single without `hook_param`, linked) are accepted.

    Raises:
        PluginError: Lists the plugins on parameters and the patched layers.
    """
    live = [
        path
        for path, module in model.named_modules()
        if isinstance(module, PatchPluginContainer) or (isinstance(module, SinglePluginBlock) and module.hook_param)
    ]
    if live:
        shown = ", ".join(f"`{path}`" for path in live[:10]) + (", ..." if len(live) > 10 else "")
        raise PluginError(
            f"{type(model).__name__} has {len(live)} plugins that are not part of its weights yet: {shown}",
            hint="call fuse() on the plugins or on their PluginGroup, or remove()",
        )
