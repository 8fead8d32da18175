"""Run the fp32 pipeline on photographs: what calibrates, what is evaluated, and the pictures to compare with."""

from pathlib import Path
from typing import Any

from sdconvert.calibration.photographs import photograph_file
from sdconvert.config import Recipe
from sdconvert.stages import StageContext


class CalibrationStage:
    """`20-calibration`: photographs → `calibration/` and `evaluation/` inputs per graph, `pictures/`."""

    name = "20-calibration"
    title = "run fp32 on photographs"
    schema_version = 1
    after = ("10-checkpoint",)
    packages = ("torch", "diffusers")

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """See `Stage.settings`."""
        return {
            "pipeline": recipe.pipeline.model_dump(mode="json"),
            "calibration": recipe.calibration.model_dump(mode="json"),
        }

    def inputs(self, recipe: Recipe) -> dict[str, Path]:
        """See `Stage.inputs`."""
        names = (*recipe.calibration.photographs, *recipe.calibration.held_out)
        return {f"photograph/{name}": photograph_file(name) for name in names}

    def run(self, context: StageContext) -> dict[str, Any]:
        """See `Stage.run`."""
        from sdconvert.calibration.run import run

        return run(context)
