"""Fusing a recipe's LoRA files into the copy of the checkpoint."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from sdconvert.checkpoint.source import WEIGHTS_STEMS
from sdconvert.config import LoraSection
from sdconvert.io.tensors import save_tensors
from sdconvert.io.weights_index import weights_file
from sdconvert.plugins import fuse_lora

STEMS = {name: WEIGHTS_STEMS[name] for name in ("unet", "controlnet", "text_encoder")}
"""Names of the weights files of the models that a LoRA can change."""


def fuse_loras(models: Mapping[str, nn.Module], loras: tuple[LoraSection, ...], folder: Path) -> list[int]:
    """Fuse LoRA files into models, in their order, and write the changed ones in float32.

    Args:
        models: By component; changed in place.
        loras: Files and their weights.
        folder: Holds a folder for each component; the weights there are replaced.

    Returns:
        How many layers each file has changed.

    Raises:
        CheckpointError: A file is no LoRA, or some of its keys land nowhere.
    """
    fused = [fuse_lora(models, Path(lora.path), lora.scale) for lora in loras]
    for component in {component for layers in fused for component in layers}:
        old = weights_file(folder / component, STEMS[component])
        old.unlink()
        save_tensors(models[component].state_dict(), folder / component / f"{STEMS[component]}.safetensors")
    return [sum(map(len, layers.values())) for layers in fused]
