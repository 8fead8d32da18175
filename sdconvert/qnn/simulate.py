"""What compiled graphs answer in the HTP simulator: to held-out inputs, as pictures, to prompt and control image.

Each function is a task for a process beside others: the simulator computes on one core.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdconvert.adapters import Tensors
from sdconvert.artifacts import RunFolder
from sdconvert.calibration.artifact import CalibrationArtifact
from sdconvert.checkpoint.artifact import CheckpointArtifact
from sdconvert.config import Recipe
from sdconvert.export.artifact import ExportArtifact
from sdconvert.io.tensors import flatten, load_tensors, save_tensors, unflatten
from sdconvert.metrics import psnr_db, sqnr_db, worst_sqnr_db
from sdconvert.pipelines.backend import GraphRunner, graph_adapters, swap_backends
from sdconvert.pipelines.prompt_units import tokenize
from sdconvert.pipelines.response import compare_responses, noise_differences, predicted_noise
from sdconvert.pipelines.sampling import sampling_arguments
from sdconvert.qnn.answered import Answered
from sdconvert.qnn.artifact import SIMULATED
from sdconvert.qnn.chain import Chain, Runner
from sdconvert.qnn.io_check import require_answers_differ
from sdconvert.qnn.simulator import Simulator


@dataclass(frozen=True)
class Road:
    """What a task needs to know of the run that it belongs to."""

    recipe: Recipe
    run: RunFolder
    contexts: Mapping[str, Path]
    """EPContext model of every graph, or of its parts, all for one SoC."""

    def exported(self) -> ExportArtifact:
        """What the export stage left."""
        return ExportArtifact(self.run.stage_folder("50-export"))

    def graphs(self) -> list[str]:
        """Names of the graphs that a pipeline calls, and of the parts of those that are split."""
        return list(dict.fromkeys([*self.exported().graphs(), *self.contexts]))

    def data(self) -> CalibrationArtifact:
        """What calibration left."""
        return CalibrationArtifact(self.run.stage_folder("20-calibration"))

    def pipeline(self) -> Any:
        """The checkpoint in fp32."""
        return CheckpointArtifact(self.run.stage_folder("10-checkpoint")).pipeline()

    def simulated(self, graph: str) -> Path:
        """Where `simulate_answers` leaves what a graph answers, beside the contexts."""
        return next(iter(self.contexts.values())).with_name(f"{graph}{SIMULATED}")

    def simulators(self, *graphs: str) -> dict[str, Runner]:
        """The named graphs or parts in the simulator; all graphs if none is named.

        They answer held-out inputs with what `simulate_answers` left: a picture, and the first of its steps, begin with
        such inputs.
        """
        return {graph: self._answered(graph) for graph in graphs or self.exported().graphs()}

    def _answered(self, graph: str) -> Runner:
        runner, path = self.simulator(graph), self.simulated(graph)
        if not path.is_file():
            return runner
        asked = [inputs for inputs, *_ in self.exported().answers(graph)]
        return Answered(runner, asked, unflatten(load_tensors(path)))

    def simulator(self, graph: str) -> Runner:
        """One graph or part in the simulator."""
        parts = self.exported().parts(graph)
        if not parts:
            return Simulator(self.contexts[graph])
        outputs = [tensor.name for tensor in self.exported().io(graph) if tensor.kind == "output"]
        return Chain(parts, {part.name: Simulator(self.contexts[part.name]) for part in parts}, outputs)


def simulate_answers(road: Road, graph: str) -> dict[str, Any]:
    """Run a graph on its held-out inputs, keep what it answers, and compare that with fp32 and the quantized model."""
    simulator = road.simulator(graph)
    answers = road.exported().answers(graph)
    simulated = [simulator(inputs) for inputs, *_ in answers]
    require_answers_differ(graph, [inputs for inputs, *_ in answers], simulated)
    save_tensors(flatten(simulated), road.simulated(graph))
    return _score(simulated, answers)


def simulate_picture(road: Road, name: str, target: Path) -> dict[str, float]:
    """Sample a held-out tile with every graph in the simulator, its own errors fed back, and keep the picture."""
    pipe, pictures = road.pipeline(), road.data().pictures()[name]
    swap_backends(pipe, graph_adapters(pipe, road.recipe.pipeline.conditioning_scale), road.simulators())
    picture = pipe(pictures["low_resolution"], **sampling_arguments(road.recipe))
    save_tensors({"simulator": picture}, target)
    return {"simulator_vs_fp32_psnr_db": psnr_db(pictures["fp32"], picture, data_range=1.0)}


def simulate_steps(road: Road, name: str, target: Path) -> dict[str, list[float]]:
    """Predict the noise of every step that fp32 took with a held-out tile, and keep it beside what fp32 predicts.

    Each step begins where the step of fp32 began, and with its text: the error is that of one ControlNet and one UNet.
    """
    fp32, simulators = road.pipeline(), road.simulators("controlnet", "unet")
    adapters = graph_adapters(fp32, road.recipe.pipeline.conditioning_scale)
    runners: dict[str, Mapping[str, GraphRunner]] = {
        "fp32": {graph: adapters[graph].run for graph in simulators},
        "simulator": simulators,
    }
    calls = [inputs for info, inputs in road.data().evaluation("controlnet").samples() if info.picture == name]
    steps = [{kind: predicted_noise(those, call) for kind, those in runners.items()} for call in calls]
    save_tensors(flatten(steps), target)
    return {"simulator_vs_fp32_db": [sqnr_db(step["fp32"], step["simulator"]) for step in steps]}


def simulate_response(road: Road, call: int) -> dict[str, list[dict[str, float]]]:
    """How strongly the noise answers to prompt and control image at one held-out input; see `compare_responses`."""
    pipe, data = road.pipeline(), road.data()
    text = data.held_out("text_encoder")[0]["input_ids"]
    no_text = tokenize(pipe.tokenizer, "", text.shape[1]).input_ids.to(text.dtype)
    calls = data.held_out("controlnet")[call : call + 1]
    fp32 = {
        name: adapter.run for name, adapter in graph_adapters(pipe, road.recipe.pipeline.conditioning_scale).items()
    }
    simulators = road.simulators("text_encoder", "controlnet", "unet")
    differences = (noise_differences(runners, calls, text, no_text) for runners in (fp32, simulators))
    return compare_responses(*differences)


def _score(results: list[Tensors], answers: list[tuple[Tensors, Tensors, Tensors]]) -> dict[str, Any]:
    """Compare the simulator with fp32 and with the quantized torch model: the worst output of the worst input."""
    _, fp32, quantized = zip(*answers, strict=True)
    return {
        "simulator_vs_fp32_db": min(map(worst_sqnr_db, fp32, results)),
        "simulator_vs_quantized_db": min(map(worst_sqnr_db, quantized, results)),
        "samples": len(results),
    }
