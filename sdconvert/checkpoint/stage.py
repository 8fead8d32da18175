"""Read the checkpoint once, strictly, and keep the copy that the rest of the road works on."""

import shutil
from pathlib import Path
from typing import Any

from sdconvert.adapters import adapter_for
from sdconvert.artifacts import write_json_atomic
from sdconvert.assets import asset_path
from sdconvert.config import Recipe
from sdconvert.errors import CheckpointError
from sdconvert.pipelines.pasd import PASDPipeline
from sdconvert.stages import StageContext

_PARTS = ("unet", "controlnet", "vae", "text_encoder", "tokenizer", "scheduler")


class CheckpointStage:
    """`10-checkpoint`: a diffusers folder of PASD → `model/` and `model.json`."""

    name = "10-checkpoint"
    title = "read the checkpoint"
    schema_version = 1
    after: tuple[str, ...] = ()
    packages = ("diffusers", "transformers", "safetensors")

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """See `Stage.settings`."""
        return {"checkpoint": recipe.checkpoint.model_dump(mode="json")}

    def inputs(self, recipe: Recipe) -> dict[str, Path]:
        """See `Stage.inputs`."""
        folder = resolve_checkpoint(recipe.checkpoint.path)
        return {f"checkpoint/{part}": folder / part for part in _PARTS}

    def run(self, context: StageContext) -> dict[str, Any]:
        """See `Stage.run`."""
        source = resolve_checkpoint(context.recipe.checkpoint.path)
        for done, part in enumerate(_PARTS):
            context.report.step(done, len(_PARTS) + 1, part)
            shutil.copytree(source / part, context.out / "model" / part)
        pipe = PASDPipeline.from_pretrained(context.out / "model")
        models = {"unet": pipe.unet, "controlnet": pipe.controlnet, "vae": pipe.vae}
        facts = {
            name: {
                "class": type(model).__name__,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "attention_layers": [vars(layer) for layer in adapter_for(model).attention_layers()],
            }
            for name, model in models.items()
        }
        write_json_atomic(facts, context.out / "model.json")
        return {f"{name}_parameters": fact["parameters"] for name, fact in facts.items()}


def resolve_checkpoint(path: str) -> Path:
    """The folder that a recipe's `checkpoint.path` means.

    Raises:
        UsageError: No such asset.
        CheckpointError: No such folder, or parts of it are missing.
    """
    folder = asset_path(path.removeprefix("asset:")) if path.startswith("asset:") else Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"`{folder}` is no folder", hint="name a diffusers folder, or asset:pasd_tiny")
    missing = [part for part in _PARTS if not (folder / part).is_dir()]
    if missing:
        found = ", ".join(sorted(child.name for child in folder.iterdir())) or "nothing"
        raise CheckpointError(
            f"`{folder}` is no PASD folder: {', '.join(missing)} missing; found {found}",
            hint=f"a PASD folder holds {', '.join(_PARTS)}",
        )
    return folder
