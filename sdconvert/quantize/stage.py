"""Take the ranges of every graph from the calibration inputs, and measure what quantization costs."""

from pathlib import Path
from typing import Any

from sdconvert.config import Recipe
from sdconvert.quantize.settings import quantizer_settings
from sdconvert.stages import StageContext


class QuantizeStage:
    """`30-quantize`: per graph, `state_dict_mha.safetensors`, `parameters_mha.encodings`, `<graph>.encodings`."""

    name = "30-quantize"
    title = "take ranges, simulate"
    schema_version = 1
    after = ("10-checkpoint", "20-calibration")
    packages = ("torch", "diffusers", "aimet-torch")

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """See `Stage.settings`."""
        return {
            "quantize": recipe.quantize.model_dump(mode="json"),
            "quantizer_settings": quantizer_settings(recipe).model_dump(mode="json"),
            "gates": recipe.gates.model_dump(include={"image_psnr_db"}),
        }

    def inputs(self, recipe: Recipe) -> dict[str, Path]:
        """See `Stage.inputs`."""
        return {}

    def run(self, context: StageContext) -> dict[str, Any]:
        """See `Stage.run`."""
        from sdconvert.quantize.run import run

        return run(context)
