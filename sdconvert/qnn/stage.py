"""Compile every graph for every SoC, then run the compiled binaries in the HTP simulator on held-out inputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdconvert.config import Recipe
from sdconvert.qnn.needs import bytes_to_compile, bytes_to_simulate
from sdconvert.stages import Need, StageContext


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

    def need(self, recipe: Recipe, parameters: Mapping[str, int]) -> Need:
        """See `Estimating.need`; of the compiler, with the parts of a split graph taken as equal."""
        parts = dict.fromkeys(parameters, 1) | {graph: 1 + len(cuts) for graph, cuts in recipe.export.split.items()}
        largest = max(parameters, key=lambda graph: parameters[graph] / parts[graph])
        graph = parameters[largest] * recipe.quantize.weight_bitwidth // 8 // parts[largest]
        compiling = bytes_to_compile(graph, recipe.pipeline.latent_tile)
        cut = f" in {parts[largest]} parts" if parts[largest] > 1 else ""
        return Need(
            max(compiling, bytes_to_simulate(0)),
            f"{largest}{cut}, {parameters[largest]:,} parameters",
            f"cut `{largest}` with `export.split`, or take smaller tiles (`pipeline.latent_tile`)",
        )

    def run(self, context: StageContext) -> dict[str, Any]:
        """See `Stage.run`."""
        from sdconvert.qnn.run import run

        return run(context)
