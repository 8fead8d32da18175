"""Put contexts, inputs and expected answers together for the phone."""

from pathlib import Path
from typing import Any

from sdconvert.config import Recipe
from sdconvert.stages import StageContext


class AndroidStage:
    """`70-android`: `bundle/` and `bundle.tar`."""

    name = "70-android"
    title = "write the bundle"
    schema_version = 2
    after = ("10-checkpoint", "20-calibration", "50-export", "60-qnn")
    packages: tuple[str, ...] = ()

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """See `Stage.settings`."""
        return {"name": recipe.name, "pipeline": recipe.pipeline.model_dump()}

    def inputs(self, recipe: Recipe) -> dict[str, Path]:
        """See `Stage.inputs`."""
        return {}

    def run(self, context: StageContext) -> dict[str, Any]:
        """See `Stage.run`."""
        from sdconvert.android.run import run

        return run(context)
