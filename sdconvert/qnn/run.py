"""The work of `60-qnn`: contexts, scores and simulated pictures."""

from collections.abc import Mapping
from typing import Any

from sdconvert.adapters import Tensors
from sdconvert.calibration.artifact import CalibrationArtifact
from sdconvert.checkpoint.artifact import CheckpointArtifact
from sdconvert.config import Recipe
from sdconvert.export.artifact import ExportArtifact
from sdconvert.io.tensors import flatten, save_tensors
from sdconvert.metrics import psnr_db, worst_sqnr_db
from sdconvert.pipelines.backend import GraphRunner, graph_adapters, swap_backends
from sdconvert.pipelines.sampling import sampling_arguments
from sdconvert.qnn.artifact import QnnArtifact, simulated_path
from sdconvert.qnn.context import Context, compile_context
from sdconvert.qnn.simulator import Simulator
from sdconvert.soc import find_soc
from sdconvert.stages import StageContext


def run(context: StageContext) -> dict[str, Any]:
    """Do the stage's work; see `Stage.run`."""
    recipe = context.recipe
    exported = ExportArtifact(context.run.stage_folder("50-export"))
    socs = [find_soc(name) for name in dict.fromkeys(recipe.qnn.socs)]
    graphs = exported.graphs()
    # Compiling a graph, simulating a graph, and each picture are the parts whose time counts.
    total = len(graphs) * len(socs) * 2 + len(recipe.calibration.held_out)
    contexts: list[Context] = []
    for soc in socs:
        for graph in graphs:
            context.report.step(len(contexts), total, f"compile {graph} for {soc.name}")
            target = context.out / soc.name
            mode = recipe.qnn.finalization_mode
            contexts.append(compile_context(exported.onnx(graph), target, soc, finalization_mode=mode))
    figures: dict[str, dict[str, Any]] = {graph: {} for graph in graphs}
    simulators = {(one.graph, one.soc.name): Simulator(one.ctx_onnx) for one in contexts}
    for (graph, soc_name), simulator in simulators.items():
        done = len(contexts) + sum(map(len, figures.values()))
        context.report.step(done, total, f"simulate {graph} on {soc_name}")
        answers = exported.answers(graph)
        simulated = [simulator(inputs) for inputs, *_ in answers]
        save_tensors(flatten(simulated), context.out / simulated_path(graph, soc_name))
        figures[graph][soc_name] = _score(simulated, answers)
    context.report.step(total - len(recipe.calibration.held_out), total, "simulate pictures")
    first = {graph: simulators[graph, socs[0].name] for graph in graphs}
    pictures = _run_pictures(context, first)
    QnnArtifact.write(context.out, contexts, {"graphs": figures, "pictures": pictures})
    return _metrics(recipe, figures, pictures, contexts)


def _score(results: list[Tensors], answers: list[tuple[Tensors, Tensors, Tensors]]) -> dict[str, Any]:
    """Compare the simulator with fp32 and with the quantized torch model: the worst output of the worst input."""
    _, fp32, quantized = zip(*answers, strict=True)
    return {
        "simulator_vs_fp32_db": min(map(worst_sqnr_db, fp32, results)),
        "simulator_vs_quantized_db": min(map(worst_sqnr_db, quantized, results)),
        "samples": len(results),
    }


def _run_pictures(context: StageContext, runners: Mapping[str, GraphRunner]) -> dict[str, dict[str, float]]:
    """Sample one tile of each held-out photograph with every graph in the simulator, its own errors fed back."""
    recipe = context.recipe
    pipe = CheckpointArtifact(context.run.stage_folder("10-checkpoint")).pipeline()
    swap_backends(pipe, graph_adapters(pipe, recipe.pipeline.conditioning_scale), runners)
    folder = context.out / "pictures"
    folder.mkdir()
    figures = {}
    for name, pictures in CalibrationArtifact(context.run.stage_folder("20-calibration")).pictures().items():
        if not name.endswith("-tile"):
            continue
        picture = pipe(pictures["low_resolution"], **sampling_arguments(recipe))
        save_tensors({"simulator": picture}, folder / f"{name}.safetensors")
        figures[name] = {"simulator_vs_fp32_psnr_db": psnr_db(pictures["fp32"], picture, data_range=1.0)}
    return figures


def _metrics(
    recipe: Recipe, figures: dict[str, Any], pictures: dict[str, Any], contexts: list[Context]
) -> dict[str, Any]:
    worst: dict[str, float] = {}
    missed = []
    for measure, gate in (
        ("simulator_vs_fp32_db", recipe.gates.simulator_vs_fp32_db),
        ("simulator_vs_quantized_db", recipe.gates.simulator_vs_quantized_db),
    ):
        for graph, by_soc in figures.items():
            for soc, scores in by_soc.items():
                worst[f"{graph}_{soc}_{measure}"] = scores[measure]
                if not scores[measure] >= gate:
                    missed.append(f"{graph} on {soc}: {measure} {scores[measure]:.1f} dB, gate {gate:.1f}")
    lowest = min(value for key, value in worst.items() if key.endswith("vs_fp32_db"))
    return {
        **worst,
        **{f"{name}_simulator_vs_fp32_psnr_db": score["simulator_vs_fp32_psnr_db"] for name, score in pictures.items()},
        "cpu_nodes": sum(one.cpu_nodes for one in contexts),
        "missed_gates": missed,
        "note": f"{len(contexts)} contexts, 0 nodes on the CPU, simulator vs fp32 ≥ {lowest:.1f} dB",
    }
