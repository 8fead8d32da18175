"""The work of `40-mha2sha`: convert, then compare the two forms on inputs of the pipeline."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.calibration.artifact import CalibrationArtifact
from sdconvert.checkpoint.artifact import CheckpointArtifact
from sdconvert.errors import QualityGateError
from sdconvert.io.encodings import read_encodings, write_encodings, write_params
from sdconvert.io.tensors import save_tensors
from sdconvert.metrics import worst_sqnr_db
from sdconvert.mha2sha.command import convert_folder
from sdconvert.mha2sha.fold import fold_scales, fold_sections
from sdconvert.mha2sha.layers import Forward, relative_errors
from sdconvert.mha2sha.name_map import NameMap
from sdconvert.mha2sha.pair import run_pair
from sdconvert.mha2sha.proof import Proof, require_small
from sdconvert.pipelines.backend import graph_adapters
from sdconvert.quantize.artifact import QuantizeArtifact, QuantizerSettings, load_simulation
from sdconvert.stages import StageContext

_LOWEST_FOLDED_DB = 50.0


def run(context: StageContext) -> dict[str, Any]:
    """Do the stage's work; see `Stage.run`."""
    if context.recipe.mha2sha.attention_form == "mha":
        return {"note": "attention stays in its multi-head form"}
    quantized = QuantizeArtifact(context.run.stage_folder("30-quantize"))
    data = CalibrationArtifact(context.run.stage_folder("20-calibration"))
    pipe = CheckpointArtifact(context.run.stage_folder("10-checkpoint")).pipeline()
    adapters = graph_adapters(pipe, context.recipe.pipeline.conditioning_scale)
    inputs = _chosen(data, "controlnet")
    run_both = partial(run_pair, adapters["unet"], adapters["controlnet"], context.recipe.pipeline.conditioning_scale)
    for graph, adapter in adapters.items():
        quantized.load_weights(graph, adapter)  # both forms compute with the weights that were rounded
    references = [run_both(one) for one in inputs]
    metrics: dict[str, Any] = {}
    recipe = context.recipe.mha2sha
    attending = {graph: adapter for graph, adapter in adapters.items() if adapter.attention_layers()}
    for done, (graph, adapter) in enumerate(attending.items()):
        context.report.step(done, len(attending), graph)
        proof = _proof(adapter, data, quantized, recalibrate=recipe.activation_encodings == "recalibrate")
        folder = context.out / graph
        summary = convert_folder(quantized.graph_folder(graph), folder, rewrites=recipe.rewrites, proof=proof)
        figures = {"heads": summary.heads, **summary.figures}
        if recipe.fold_scale:
            figures |= _fold(adapter, data, folder, quantized.settings())
        metrics |= {f"{graph}_{name}": value for name, value in figures.items()}
    # UNet and ControlNet have their SHA form by now: each alone is right, and so must be what they do together.
    outputs = [{"out_sample": run_both(one)} for one in inputs]
    errors = relative_errors(Forward([{"out_sample": one} for one in references], []), Forward(outputs, []))
    require_small("the UNet behind its ControlNet", errors)
    return metrics | {"pair_fp32_relative_error": max(errors.values())}


def _chosen(data: CalibrationArtifact, graph: str) -> list[Tensors]:
    """The first and last calibration input of a graph, and a held-out one."""
    samples = list(data.calibration(graph))
    return [samples[0], samples[-1], next(iter(data.evaluation(graph)))]


def _proof(
    adapter: ModelAdapter, data: CalibrationArtifact, quantized: QuantizeArtifact, *, recalibrate: bool
) -> Proof:
    graph = adapter.graph_name
    inputs = _chosen(data, graph)
    mha = quantized.simulation(graph, adapter, inputs[0])
    if not recalibrate:
        return Proof(adapter, mha, inputs)
    return Proof(adapter, mha, inputs, samples=data.calibration(graph), held_out=list(data.evaluation(graph)))


def _fold(
    adapter: ModelAdapter, data: CalibrationArtifact, folder: Path, settings: QuantizerSettings
) -> dict[str, float]:
    """Fold the scale of attention into its queries, in model and files; return how well that agrees with before."""
    graph = adapter.graph_name
    one = next(iter(data.evaluation(graph)))
    path = folder / f"{graph}.encodings"
    before = load_simulation(path, adapter, one, settings)(one)
    factors = fold_scales(adapter.model)
    save_tensors(adapter.model.state_dict(), folder / "state_dict_sha.safetensors")
    sections = fold_sections(read_encodings(path), factors)
    write_params(folder / "parameters_sha.encodings", sections["param_encodings"])
    write_encodings(path, sections)
    replace(NameMap.load(folder), folded=factors).save(folder)
    agreement = worst_sqnr_db(before, load_simulation(path, adapter, one, settings)(one))
    if not agreement >= _LOWEST_FOLDED_DB:
        raise QualityGateError(
            f"{graph}: with the scale folded in, the quantized model agrees to {agreement:.1f} dB only with itself "
            f"before (gate {_LOWEST_FOLDED_DB:.0f} dB)",
            hint="set mha2sha.fold_scale to false",
        )
    return {"folded_vs_unfolded_db": agreement}
