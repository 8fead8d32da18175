"""Putting a LoRA file onto models: every key finds its layer, or nothing is attached."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from sdconvert.errors import CheckpointError, PluginError
from sdconvert.plugins.base import unwrap
from sdconvert.plugins.group import PluginGroup
from sdconvert.plugins.lora import LoraBlock
from sdconvert.plugins.lora_file import LowRankUpdate, listed, read_lora
from sdconvert.plugins.selectors import iter_layers

_LORA_ID = "file"


def fuse_lora(
    model: nn.Module | Mapping[str, nn.Module], path: Path, scale: float = 1.0, *, lora_id: str = _LORA_ID
) -> dict[str, list[str]]:
    """Add a LoRA file to the weights for good: W + scale * alpha / rank * up @ down.

    Args:
        model: A UNet, or models by the component names of the file (`unet`, `controlnet`, `text_encoder`).
        path: Of the file.
        scale: Weight of the whole file.
        lora_id: Of the plugins in between.

    Returns:
        Paths of the changed layers by component.

    Raises:
        CheckpointError: The file is no LoRA, or some of its keys land nowhere; the message lists them.
        PluginError: `scale` is zero, or another plugin stands in the way.
    """
    groups = attach_lora(model, path, scale, lora_id=lora_id)
    for group in groups.values():
        group.fuse()
    return {component: list(group) for component, group in groups.items()}


def attach_lora(
    model: nn.Module | Mapping[str, nn.Module], path: Path, scale: float = 1.0, *, lora_id: str = _LORA_ID
) -> dict[str, PluginGroup]:
    """Attach a LoRA file as `LoraBlock`s, to be compared, fused or removed; all of it or nothing.

    Args:
        model: A UNet, or models by component name.
        path: Of the file.
        scale: Weight of the whole file.
        lora_id: Tells several files on one model apart.

    Returns:
        The plugins by component.

    Raises:
        CheckpointError: As `fuse_lora`.
        PluginError: `scale` is zero.
    """
    if scale == 0:
        raise PluginError(f"a scale of 0 gives `{path}` no effect", hint="leave the LoRA out, or choose another scale")
    places = match_lora(model, path)
    groups: dict[str, PluginGroup] = {}
    with ExitStack() as undo:
        for component, layer_path, layer, update in places:
            plugin = LoraBlock(lora_id, layer, rank=update.up.shape[1], alpha=scale * update.alpha)
            undo.callback(plugin.remove)
            _fill(plugin, update)
            groups.setdefault(component, PluginGroup())[layer_path] = plugin
        undo.pop_all()
    return groups


def match_lora(
    model: nn.Module | Mapping[str, nn.Module], path: Path
) -> list[tuple[str, str, nn.Linear | nn.Conv2d, LowRankUpdate]]:
    """Find the layer of each update of a file: (component, path, layer, update).

    Raises:
        CheckpointError: Some keys land nowhere; the message lists them by reason.
    """
    models = {"unet": model} if isinstance(model, nn.Module) else dict(model)
    layers = {component: _layers(model) for component, model in models.items()}
    places = []
    wrong: dict[str, list[str]] = {}
    for update in read_lora(path):
        component = update.component or next(iter(models))
        if component not in models:
            wrong.setdefault(f"for a model that is not loaded ({component})", []).extend(update.keys)
            continue
        found = [name for name in _names(update) if name in layers[component]]
        if not found:
            wrong.setdefault(f"for no layer of {component}", []).extend(update.keys)
            continue
        layer_path, layer = layers[component][found[0]]
        if _fits(layer, update):
            places.append((component, layer_path, layer, update))
        else:
            shapes = f"{tuple(update.up.shape)} @ {tuple(update.down.shape)}, not {tuple(layer.weight.shape)}"
            wrong.setdefault("of another shape", []).append(f"{update.keys[0]} ({shapes})")
    if wrong:
        raise CheckpointError(
            f"`{path}` does not fit: " + "; ".join(f"{len(keys)} {why}: {listed(keys)}" for why, keys in wrong.items()),
            hint="a LoRA fits the models that it was trained on, and those of the same widths",
        )
    return places


def _layers(model: nn.Module) -> dict[str, tuple[str, nn.Linear | nn.Conv2d]]:
    """(path, layer) of everything that a LoRA can change, by path and by kohya's form of it."""
    layers: dict[str, tuple[str, nn.Linear | nn.Conv2d]] = {}
    for path, module in iter_layers(model):
        layer = unwrap(module)
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        # Transformers 5 dropped the outermost level of CLIP's module paths, which LoRA files still have.
        for name in (path, f"text_model.{path}"):
            layers[name] = layers[name.replace(".", "_")] = (path, layer)
    return layers


def _names(update: LowRankUpdate) -> list[str]:
    """Names under which a layer may be known; diffusers' first LoRAs said `to_out` for `to_out.0`."""
    dot = "_" if update.underscored else "."
    return [update.layer, f"{update.layer}{dot}0"] if update.layer.endswith("to_out") else [update.layer]


def _fits(layer: nn.Linear | nn.Conv2d, update: LowRankUpdate) -> bool:
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    kernel = (1, 1) if isinstance(layer, nn.Linear) else layer.kernel_size
    (out, rank), inside = update.up.shape[:2], layer.weight.shape[1]
    return (
        out == layer.weight.shape[0]
        and update.up.shape[2:] in ((), (1, 1))
        and update.down.shape[:2] == (rank * groups, inside)
        # A linear layer and a 1x1 convolution are one thing in two notations.
        and (update.down.shape[2:] or (1, 1)) == kernel
    )


@torch.no_grad()
def _fill(plugin: LoraBlock, update: LowRankUpdate) -> None:
    targets: tuple[tuple[Tensor, Tensor], ...] = (
        (plugin.layer.lora_down.weight, update.down),
        (plugin.layer.lora_up.weight, update.up),
    )
    for parameter, tensor in targets:
        parameter.copy_(tensor.reshape(parameter.shape))
