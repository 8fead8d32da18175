"""The real command line on a road of small stages, so that its tests take no model; run as a script."""

import os
import signal
from pathlib import Path
from typing import Any

from sdconvert.cli import road
from sdconvert.cli.app import main
from sdconvert.config import Recipe
from sdconvert.stages import StageContext


class ShortStage:
    """Writes the prompt; certain prompts make the stages 30 and 60 misbehave."""

    title = "a stage of the test"
    schema_version = 1
    after: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        self.name = name

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        return {"pipeline": {"prompt": recipe.pipeline.prompt}}

    def inputs(self, recipe: Recipe) -> dict[str, Path]:
        return {}

    def run(self, context: StageContext) -> dict[str, Any]:
        prompt = context.recipe.pipeline.prompt
        context.report.step(1, 2, "half")
        if (self.name, prompt) == ("30-quantize", "interrupt"):
            os.kill(os.getpid(), signal.SIGINT)
        if (self.name, prompt) == ("30-quantize", "defect"):
            raise ZeroDivisionError("by zero")
        (context.out / "report.html").write_text(prompt)
        missed = ["simulator 12.0 dB < 35.0 dB"] if (self.name, prompt) == ("60-qnn", "bad") else []
        return {"note": "figure 41.2 dB", "sqnr_db": float("inf"), "missed_gates": missed}


def load_short_road(length: int = len(road.ROAD)) -> list[Any]:
    return [ShortStage(name) for name in list(road.ROAD)[:length]]


if __name__ == "__main__":
    road.load_road = load_short_road
    main()
