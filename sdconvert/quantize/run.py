"""The work of `30-quantize`: ranges, files, per-layer figures and quantized pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sdconvert.calibration.artifact import ActivationStore, CalibrationArtifact
from sdconvert.checkpoint.artifact import CheckpointArtifact
from sdconvert.config import Recipe
from sdconvert.io.encodings import write_encodings, write_params
from sdconvert.io.files import write_json_atomic
from sdconvert.io.tensors import save_tensors
from sdconvert.metrics import psnr_db, worst_sqnr_db
from sdconvert.pipelines.backend import graph_adapters, swap_backends
from sdconvert.pipelines.pasd import PASDPipeline
from sdconvert.pipelines.sampling import sampling_arguments
from sdconvert.quantize.artifact import ADAROUND
from sdconvert.quantize.estimators import require_known_kinds
from sdconvert.quantize.files import to_sections
from sdconvert.quantize.rounding import plan_rounding, round_weights, write_figures
from sdconvert.quantize.settings import quantizer_settings
from sdconvert.quantize.simulation import Simulation
from sdconvert.quantize.weight_grids import require_effect
from sdconvert.stages import StageContext


def run(context: StageContext) -> dict[str, Any]:
    """Do the stage's work; see `Stage.run`."""
    settings = quantizer_settings(context.recipe)
    write_json_atomic(settings.model_dump(mode="json"), context.out / "settings.json")
    pipe = CheckpointArtifact(context.run.stage_folder("10-checkpoint")).pipeline()
    data = CalibrationArtifact(context.run.stage_folder("20-calibration"))
    adapters = graph_adapters(pipe, context.recipe.pipeline.conditioning_scale)
    metrics: dict[str, Any] = {}
    simulations = {
        graph: Simulation(adapter, next(iter(data.calibration(graph))), settings) for graph, adapter in adapters.items()
    }
    kinds = {kind for one in simulations.values() for kind in one.quantizers.kinds.values()}
    require_known_kinds(settings.estimators, kinds, settings.fixed_ranges)
    require_effect(settings.layers, {graph: one.quantizers.layers for graph, one in simulations.items()})
    for done, (graph, simulation) in enumerate(simulations.items()):
        context.report.step(done, len(adapters) + 1, graph)
        simulation.calibrate(data.calibration(graph))
    nearest: dict[str, Tensor] = {}
    if context.recipe.quantize.adaround:
        swap_backends(pipe, adapters, simulations)
        nearest = _draw(pipe, context.recipe, data)
        metrics |= _round(simulations, data, context)
    for graph, simulation in simulations.items():
        figures = _write(simulation, data, context.out / graph)
        metrics |= {f"{graph}_{name}": value for name, value in figures.items()}
    context.report.step(len(adapters), len(adapters) + 1, "pictures")
    swap_backends(pipe, adapters, simulations)
    drawn = _draw(pipe, context.recipe, data)
    return metrics | _judge_pictures(drawn, nearest, context.recipe, data, context.out / "pictures")


def _round(simulations: Mapping[str, Simulation], data: CalibrationArtifact, context: StageContext) -> dict[str, float]:
    """Round the weights of all graphs, once all of them are known to fit; return what rounding to nearest gave."""
    section = context.recipe.quantize.adaround
    assert section is not None  # for the type checker
    samples = {graph: data.calibration(graph, section.samples) for graph in simulations}
    for graph, simulation in simulations.items():
        plan_rounding(simulation, section, len(samples[graph]))
    metrics: dict[str, float] = {}
    for graph, simulation in simulations.items():
        metrics[f"{graph}_nearest_vs_fp32_db"] = _against_fp32(simulation, data)

        def report(done: int, total: int, note: str, graph: str = graph) -> None:
            context.report.step(done, total, f"{graph}: {note}")

        def label(index: int, store: ActivationStore = samples[graph]) -> str:
            info = store.infos[index]
            return f"calibration sample `{info.id}` (step {info.step})"

        scratch = context.scratch / "adaround" / graph
        result = round_weights(simulation, samples[graph], section, scratch, report, label)
        (context.out / graph).mkdir()
        write_figures(result, context.out / graph / ADAROUND)
        metrics[f"{graph}_adaround_layers"] = len(result.figures)
        metrics[f"{graph}_adaround_layers_that_stayed_nearest"] = sum(
            figures.fell_back for figures in result.figures.values()
        )
    return metrics


def _against_fp32(simulation: Simulation, data: CalibrationArtifact) -> float:
    held_out = list(data.evaluation(simulation.adapter.graph_name))
    return min(map(worst_sqnr_db, map(simulation.adapter.run, held_out), map(simulation, held_out)))


def _write(simulation: Simulation, data: CalibrationArtifact, folder: Path) -> dict[str, float]:
    """Write a graph's files; return worst SQNRs in dB against fp32 on held-out inputs.

    The second figure tells how much of the loss is the weights': only they are rounded.
    """
    adapter = simulation.adapter
    folder.mkdir(exist_ok=True)
    save_tensors({**adapter.model.state_dict(), **simulation.rounded_weights}, folder / "state_dict_mha.safetensors")
    sections = to_sections(simulation)
    write_params(folder / "parameters_mha.encodings", sections["param_encodings"])
    write_encodings(folder / f"{adapter.graph_name}.encodings", sections)
    write_json_atomic(adapter.config(), folder / "config.json")
    held_out = list(data.evaluation(adapter.graph_name))
    write_json_atomic(simulation.layer_sqnr_db(held_out[0]), folder / "layer_sqnr_db.json")
    fp32 = [adapter.run(inputs) for inputs in held_out]
    weights_only = simulation.run_with_activations_unquantized(held_out)
    return {
        "simulation_vs_fp32_db": min(map(worst_sqnr_db, fp32, map(simulation, held_out))),
        "weights_only_vs_fp32_db": min(map(worst_sqnr_db, fp32, weights_only)),
    }


def _draw(pipe: PASDPipeline, recipe: Recipe, data: CalibrationArtifact) -> dict[str, Tensor]:
    """Sample every held-out crop with all graphs quantized, same seed as fp32."""
    crops = data.pictures().items()
    return {name: pipe(pictures["low_resolution"], **sampling_arguments(recipe)) for name, pictures in crops}


def _judge_pictures(
    drawn: Mapping[str, Tensor],
    nearest: Mapping[str, Tensor],
    recipe: Recipe,
    data: CalibrationArtifact,
    folder: Path,
) -> dict[str, Any]:
    """Write the quantized pictures, and compare them with fp32."""
    folder.mkdir()
    figures: dict[str, Any] = {}
    missed = []
    for name, pictures in data.pictures().items():
        own = {"quantized": drawn[name]} | ({"nearest": nearest[name]} if nearest else {})
        save_tensors(own, folder / f"{name}.safetensors")
        found = {kind: psnr_db(pictures["fp32"], picture, data_range=1.0) for kind, picture in own.items()}
        figures |= {f"{name}_{kind}_vs_fp32_psnr_db": psnr for kind, psnr in found.items()}
        if not (psnr := found["quantized"]) >= recipe.gates.image_psnr_db:
            missed.append(f"picture {name}: quantized vs fp32 {psnr:.1f} dB, gate {recipe.gates.image_psnr_db:.1f}")
    lowest = min(figures[f"{name}_quantized_vs_fp32_psnr_db"] for name in drawn)
    return {**figures, "missed_gates": missed, "note": f"pictures: quantized vs fp32 ≥ {lowest:.1f} dB"}
