"""Convert every graph that attends per head, and prove on inputs of the pipeline that nothing changed."""

from pathlib import Path
from typing import Any

from sdconvert.config import Recipe
from sdconvert.stages import StageContext


class Mha2ShaStage:
    """`40-mha2sha`: per graph, `state_dict_sha.safetensors`, `parameters_sha.encodings`, `<graph>.encodings`."""

    name = "40-mha2sha"
    title = "split heads, verify"
    schema_version = 1
    after = ("10-checkpoint", "20-calibration", "30-quantize")
    packages = ("torch", "diffusers", "aimet-torch")

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """See `Stage.settings`."""
        return {"mha2sha": recipe.mha2sha.model_dump(mode="json")}

    def inputs(self, recipe: Recipe) -> dict[str, Path]:
        """See `Stage.inputs`."""
        return {}

    def run(self, context: StageContext) -> dict[str, Any]:
        """See `Stage.run`."""
        from sdconvert.mha2sha.run import run

        return run(context)
