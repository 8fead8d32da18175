"""Write every graph as ONNX, and compare ONNX Runtime with the simulation and with fp32."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdconvert.config import Recipe
from sdconvert.export.needs import bytes_to_export
from sdconvert.stages import Need, StageContext

_FP32_BYTES = 4


class ExportStage:
    """`50-export`: `<graph>.onnx`, and what fp32 and simulation answer to the held-out inputs."""

    name = "50-export"
    title = "write ONNX, run it"
    schema_version = 1
    after = ("10-checkpoint", "20-calibration", "30-quantize", "40-mha2sha")
    packages = ("torch", "diffusers", "aimet-torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime")

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """See `Stage.settings`."""
        targets = [target for target in recipe.export.targets if target != "dlc"]
        return {"export": recipe.export.model_dump(mode="json") | {"targets": targets}}

    def inputs(self, recipe: Recipe) -> dict[str, Path]:
        """See `Stage.inputs`."""
        return {}

    def need(self, recipe: Recipe, parameters: Mapping[str, int]) -> Need:
        """See `Estimating.need`."""
        largest = max(parameters, key=lambda part: parameters[part])
        needed = bytes_to_export(_FP32_BYTES * parameters[largest], recipe.pipeline.latent_tile)
        return Need(
            needed, f"{largest}, {parameters[largest]:,} parameters", "a graph is exported whole, on a larger machine"
        )

    def run(self, context: StageContext) -> dict[str, Any]:
        """See `Stage.run`."""
        from sdconvert.export.run import run

        return run(context)
