"""The work of `40-mha2sha`: convert, then compare the two forms on inputs of the pipeline."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.artifacts import write_json_atomic
from sdconvert.calibration.artifact import CalibrationArtifact
from sdconvert.checkpoint.artifact import CheckpointArtifact
from sdconvert.errors import QualityGateError
from sdconvert.io.encodings import read_encodings, write_encodings, write_params
from sdconvert.io.tensors import save_tensors
from sdconvert.metrics import worst_sqnr_db
from sdconvert.mha2sha.artifact import AGREEMENT, GRAPHS, HEAD_RANGES, Mha2ShaArtifact
from sdconvert.mha2sha.command import convert_folder
from sdconvert.mha2sha.fold import fold_scales, fold_sections
from sdconvert.mha2sha.layers import Forward, agreements_db, relative_errors, run_fp32, run_quantized
from sdconvert.mha2sha.name_map import NameMap
from sdconvert.mha2sha.pair import run_pair
from sdconvert.mha2sha.recalibrate import OUTPUT, recalibrate_heads
from sdconvert.pipelines.backend import graph_adapters
from sdconvert.quantize.artifact import QuantizeArtifact, Simulation, load_simulation, save_simulation
from sdconvert.stages import StageContext

_LARGEST_FP32_ERROR = 1e-5
_LOWEST_FOLDED_DB = 50.0


def run(context: StageContext) -> dict[str, Any]:
    """Do the stage's work; see `Stage.run`."""
    quantized = QuantizeArtifact(context.run.stage_folder("30-quantize"))
    data = CalibrationArtifact(context.run.stage_folder("20-calibration"))
    pipe = CheckpointArtifact(context.run.stage_folder("10-checkpoint")).pipeline()
    adapters = graph_adapters(pipe, context.recipe.pipeline.conditioning_scale)
    inputs = _chosen(data, "controlnet")
    run_both = partial(run_pair, adapters["unet"], adapters["controlnet"], context.recipe.pipeline.conditioning_scale)
    for graph in GRAPHS:
        quantized.load_weights(graph, adapters[graph])  # both forms compute with the weights that were rounded
    references = [run_both(one) for one in inputs]
    metrics: dict[str, Any] = {}
    for done, graph in enumerate(GRAPHS):
        context.report.step(done, len(GRAPHS), graph)
        settings = context.recipe.mha2sha
        summary = convert_folder(
            quantized.graph_folder(graph),
            context.out / graph,
            rewrites=settings.rewrites,
            keep_ranges=settings.activation_encodings == "recalibrate",
        )
        metrics[f"{graph}_heads"] = summary.heads
        sha, figures = _verify(adapters[graph], data, quantized, Mha2ShaArtifact(context.out))
        metrics |= figures
        if context.recipe.mha2sha.activation_encodings == "recalibrate":
            metrics |= _recalibrate(sha, data, context.out / graph)
        if context.recipe.mha2sha.fold_scale:
            metrics |= _fold(sha, data, context.out / graph)
    # Both models have their SHA form by now: each alone is right, and so must be what they do together.
    outputs = [{"out_sample": run_both(one)} for one in inputs]
    errors = relative_errors(Forward([{"out_sample": one} for one in references], []), Forward(outputs, []))
    _require_small("the UNet behind its ControlNet", errors)
    return metrics | {"pair_fp32_relative_error": max(errors.values())}


def _chosen(data: CalibrationArtifact, graph: str) -> list[Tensors]:
    """The first and last calibration input of a graph, and a held-out one."""
    samples = list(data.calibration(graph))
    return [samples[0], samples[-1], next(iter(data.evaluation(graph)))]


def _require_small(what: str, errors: Mapping[str, float]) -> None:
    # NaN is no small error.
    if large := {place: error for place, error in errors.items() if not error <= _LARGEST_FP32_ERROR}:
        place, error = next(iter(large.items()))
        raise QualityGateError(
            f"{what}: SHA differs from MHA by {error:.1e} relative in fp32 (allowed {_LARGEST_FP32_ERROR:.0e}), "
            f"first at `{place}`",
            hint="the rewrite is wrong for this model; please report it with its config.json",
        )


def _verify(
    adapter: ModelAdapter, data: CalibrationArtifact, quantized: QuantizeArtifact, converted: Mha2ShaArtifact
) -> tuple[Simulation, dict[str, float]]:
    """Compare the two forms layer by layer, on the first and last calibration input and a held-out one.

    Returns:
        The quantized SHA form with the parents' ranges, and the figures.
    """
    graph = adapter.graph_name
    inputs = _chosen(data, graph)
    layers = [layer.path for layer in adapter.attention_layers()]
    fp32 = run_fp32(adapter, layers, inputs)
    simulated = run_quantized(quantized.simulation(graph, adapter, inputs[0]), layers, inputs)
    sha = converted.simulation(graph, adapter, inputs[0], quantized.settings())
    errors = relative_errors(fp32, run_fp32(adapter, layers, inputs))
    _require_small(graph, errors)
    agreements = agreements_db(simulated, run_quantized(sha, layers, inputs))
    figures = {name: {"fp32_relative_error": errors[name], "quantized_db": agreements[name]} for name in errors}
    write_json_atomic(figures, converted.graph_folder(graph) / AGREEMENT)
    return sha, {
        f"{graph}_fp32_relative_error": max(errors.values()),
        f"{graph}_quantized_sha_vs_mha_db": min(agreements[name] for name in fp32.graph[0]),
        f"{graph}_worst_layer_sha_vs_mha_db": min(agreements.values()),
    }


def _recalibrate(sha: Simulation, data: CalibrationArtifact, folder: Path) -> dict[str, float]:
    """Give every head ranges of its own, in the graph's file too; return what the output gains."""
    graph = sha.adapter.graph_name
    figures = recalibrate_heads(sha, data.calibration(graph), list(data.evaluation(graph)))
    save_simulation(sha, folder / f"{graph}.encodings")
    write_json_atomic(figures, folder / HEAD_RANGES)
    return {f"{graph}_{ranges}_vs_fp32_db": value for ranges, value in figures[OUTPUT].items()}


def _fold(sha: Simulation, data: CalibrationArtifact, folder: Path) -> dict[str, float]:
    """Fold the scale of attention into its queries, in model and files; return how well that agrees with before."""
    adapter, graph = sha.adapter, sha.adapter.graph_name
    one = next(iter(data.evaluation(graph)))
    before = sha(one)
    factors = fold_scales(adapter.model)
    save_tensors(adapter.model.state_dict(), folder / "state_dict_sha.safetensors")
    path = folder / f"{graph}.encodings"
    sections = fold_sections(read_encodings(path), factors)
    write_params(folder / "parameters_sha.encodings", sections["param_encodings"])
    write_encodings(path, sections)
    replace(NameMap.load(folder), folded=factors).save(folder)
    agreement = worst_sqnr_db(before, load_simulation(path, adapter, one, sha.settings)(one))
    if not agreement >= _LOWEST_FOLDED_DB:
        raise QualityGateError(
            f"{graph}: with the scale folded in, the quantized model agrees to {agreement:.1f} dB only with itself "
            f"before (gate {_LOWEST_FOLDED_DB:.0f} dB)",
            hint="set mha2sha.fold_scale to false",
        )
    return {f"{graph}_folded_vs_unfolded_db": agreement}
