"""Gather what the stages measured and drew into one page, and the same figures into one JSON file."""

from pathlib import Path
from typing import Any

from sdconvert.assets import asset_path
from sdconvert.config import Recipe
from sdconvert.stages import StageContext


class ReportStage:
    """`80-report`: `report.html`, `report.json`, and the pictures in both as `pictures/<crop>-<kind>.png`."""

    name = "80-report"
    title = "write the report"
    schema_version = 1
    after: tuple[str, ...] = (
        "10-checkpoint",
        "20-calibration",
        "30-quantize",
        "40-mha2sha",
        "50-export",
        "60-qnn",
        "70-android",
    )
    packages = ("jinja2", "matplotlib", "torchmetrics")

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """See `Stage.settings`."""
        return {
            "name": recipe.name,
            "gates": recipe.gates.model_dump(mode="json"),
            "report": recipe.report.model_dump(mode="json"),
        }

    def inputs(self, recipe: Recipe) -> dict[str, Path]:
        """See `Stage.inputs`."""
        given = {"sensitivity": recipe.report.sensitivity, "bench": recipe.report.bench}
        return {
            "licences of the photographs": _licences(),
            **{name: Path(file) for name, file in given.items() if file is not None},
        }

    def run(self, context: StageContext) -> dict[str, Any]:
        """See `Stage.run`."""
        from sdconvert.report.run import run

        return run(context, self.after, _licences())


def _licences() -> Path:
    return asset_path("photos") / "LICENSES.md"
