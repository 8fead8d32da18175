"""Compile every graph for every SoC, then run the compiled binaries in the HTP simulator on held-out inputs."""

from pathlib import Path
from typing import Any

from sdconvert.config import Recipe
from sdconvert.stages import StageContext


class QnnStage:
    """`60-qnn`: `<soc>/<graph>_qnn.bin`, `pictures/`, `steps/`, and the figures of the simulator in `qnn.json`."""

    name = "60-qnn"
    title = "compile for HTP, simulate"
    schema_version = 2
    after = ("10-checkpoint", "20-calibration", "50-export")
    packages = ("onnxruntime", "onnxruntime-qnn", "torch", "diffusers")

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """See `Stage.settings`."""
        gates = recipe.gates.model_dump(exclude={"image_psnr_db"})
        targets = [target for target in recipe.export.targets if target == "dlc"]
        return {"qnn": recipe.qnn.model_dump(mode="json"), "export": {"targets": targets}, "gates": gates}

    def inputs(self, recipe: Recipe) -> dict[str, Path]:
        """See `Stage.inputs`."""
        return {}

    def run(self, context: StageContext) -> dict[str, Any]:
        """See `Stage.run`."""
        from sdconvert.qnn.run import run

        return run(context)
