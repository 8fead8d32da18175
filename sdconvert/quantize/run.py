"""The work of `30-quantize`: ranges, files, per-layer figures and quantized pictures."""

from pathlib import Path
from typing import Any

from sdconvert.artifacts import write_json_atomic
from sdconvert.calibration.artifact import CalibrationArtifact
from sdconvert.checkpoint.artifact import CheckpointArtifact
from sdconvert.config import Recipe
from sdconvert.io.encodings import read_encodings, write_encodings, write_params
from sdconvert.io.tensors import save_tensors
from sdconvert.metrics import psnr_db, worst_sqnr_db
from sdconvert.pipelines.backend import graph_adapters, swap_backends
from sdconvert.pipelines.pasd import PASDPipeline
from sdconvert.pipelines.sampling import sampling_arguments
from sdconvert.quantize.estimators import require_known_kinds
from sdconvert.quantize.files import to_sections
from sdconvert.quantize.grid import fake_quantized
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
    require_known_kinds(settings.estimators, kinds, settings.ranges)
    require_effect(settings.layers, {graph: one.quantizers.layers for graph, one in simulations.items()})
    for done, (graph, simulation) in enumerate(simulations.items()):
        context.report.step(done, len(adapters) + 1, graph)
        simulation.calibrate(data.calibration(graph))
        figures = _write(simulation, data, context.out / graph)
        metrics |= {f"{graph}_{name}": value for name, value in figures.items()}
    context.report.step(len(adapters), len(adapters) + 1, "pictures")
    swap_backends(pipe, adapters, simulations)
    return metrics | _run_pictures(pipe, context.recipe, data, context.out / "pictures")


def _write(simulation: Simulation, data: CalibrationArtifact, folder: Path) -> dict[str, float]:
    """Write a graph's files; return worst SQNRs in dB against fp32 on held-out inputs.

    The second figure tells how much of the loss is the weights': only they are rounded, by the file's own encodings.
    """
    adapter = simulation.adapter
    folder.mkdir()
    save_tensors(dict(adapter.model.state_dict()), folder / "state_dict_mha.safetensors")
    sections = to_sections(simulation)
    write_params(folder / "parameters_mha.encodings", sections["param_encodings"])
    write_encodings(folder / f"{adapter.graph_name}.encodings", sections)
    write_json_atomic(adapter.config(), folder / "config.json")
    held_out = list(data.evaluation(adapter.graph_name))
    write_json_atomic(simulation.layer_sqnr_db(held_out[0]), folder / "layer_sqnr_db.json")
    fp32 = [adapter.run(inputs) for inputs in held_out]
    with fake_quantized(adapter.model, read_encodings(folder / "parameters_mha.encodings")["param_encodings"]):
        weights_only = [adapter.run(inputs) for inputs in held_out]
    return {
        "simulation_vs_fp32_db": min(map(worst_sqnr_db, fp32, map(simulation, held_out))),
        "weights_only_vs_fp32_db": min(map(worst_sqnr_db, fp32, weights_only)),
    }


def _run_pictures(pipe: PASDPipeline, recipe: Recipe, data: CalibrationArtifact, folder: Path) -> dict[str, Any]:
    """Sample every held-out crop with all graphs quantized, same seed as fp32."""
    folder.mkdir()
    figures: dict[str, Any] = {}
    missed = []
    for name, pictures in data.pictures().items():
        picture = pipe(pictures["low_resolution"], **sampling_arguments(recipe))
        save_tensors({"quantized": picture}, folder / f"{name}.safetensors")
        psnr = psnr_db(pictures["fp32"], picture, data_range=1.0)
        figures[f"{name}_quantized_vs_fp32_psnr_db"] = psnr
        if not psnr >= recipe.gates.image_psnr_db:
            missed.append(f"picture {name}: quantized vs fp32 {psnr:.1f} dB, gate {recipe.gates.image_psnr_db:.1f}")
    note = f"pictures: quantized vs fp32 ≥ {min(figures.values()):.1f} dB"
    return {**figures, "missed_gates": missed, "note": note}
