"""A stage that computes nothing; its file imports little, for a stage's checksum is that of all that it can import."""

import os
import signal
from pathlib import Path
from typing import Any

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
