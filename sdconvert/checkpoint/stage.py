"""Read the checkpoint once, strictly, fuse LoRAs, and keep the copy that the rest of the road works on."""

from pathlib import Path
from typing import Any

from sdconvert.checkpoint.source import PARTS, resolve_checkpoint
from sdconvert.config import Recipe
from sdconvert.stages import StageContext


class CheckpointStage:
    """`10-checkpoint`: a diffusers folder of PASD → `model/` and `model.json`."""

    name = "10-checkpoint"
    title = "read the checkpoint"
    schema_version = 1
    after: tuple[str, ...] = ()
    packages = ("diffusers", "transformers", "safetensors", "torch")

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """See `Stage.settings`."""
        return {"checkpoint": recipe.checkpoint.model_dump(mode="json")}

    def inputs(self, recipe: Recipe) -> dict[str, Path]:
        """See `Stage.inputs`."""
        folder = resolve_checkpoint(recipe.checkpoint.path)
        parts = {f"checkpoint/{part}": folder / part for part in PARTS}
        return parts | {f"loras/{index}": Path(lora.path) for index, lora in enumerate(recipe.checkpoint.loras)}

    def run(self, context: StageContext) -> dict[str, Any]:
        """See `Stage.run`."""
        from sdconvert.checkpoint.run import run

        return run(context)
