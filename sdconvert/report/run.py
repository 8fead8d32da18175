"""The work of `80-report`: collect pictures and figures, write them as page, as JSON and as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdconvert.io.files import write_json_atomic, write_text_atomic
from sdconvert.io.images import write_png
from sdconvert.report.artifact import ReportArtifact
from sdconvert.report.figures import collect_figures
from sdconvert.report.html import render_html
from sdconvert.report.pictures import collect_pictures
from sdconvert.stages import StageContext


def run(context: StageContext, stages: Sequence[str], licences: Path) -> dict[str, Any]:
    """Do the stage's work, telling of `stages`; `licences` lists the photographs. See `Stage.run`."""
    artifact = ReportArtifact(context.out)
    context.report.step(0, 3, "pictures")
    pictures = collect_pictures(context.run)
    files = {name: {kind: artifact.picture(name, kind) for kind in kinds} for name, kinds in pictures.items()}
    for name, kinds in pictures.items():
        for kind, picture in kinds.items():
            write_png(picture, files[name][kind])
    context.report.step(1, 3, "figures")
    figures = collect_figures(context.run, context.recipe, stages, pictures, licences)
    write_json_atomic(figures, artifact.json)
    context.report.step(2, 3, "page")
    write_text_atomic(render_html(figures, files), artifact.html)
    gates = figures["gates"]
    passed = sum(gate["passed"] for gate in gates)
    return {
        "report": "80-report/report.html",
        "note": f"{passed} of {len(gates)} gates passed",
    }
