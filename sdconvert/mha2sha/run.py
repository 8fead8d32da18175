"""The work of `40-mha2sha`: convert, then compare the two forms on inputs of the pipeline."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.calibration.artifact import CalibrationArtifact
from sdconvert.checkpoint.artifact import CheckpointArtifact
from sdconvert.errors import QualityGateError
from sdconvert.metrics import max_abs, worst_sqnr_db
from sdconvert.mha2sha.artifact import GRAPHS, Mha2ShaArtifact
from sdconvert.mha2sha.command import convert_folder
from sdconvert.mha2sha.pair import run_pair
from sdconvert.pipelines.backend import graph_adapters
from sdconvert.quantize.artifact import QuantizeArtifact
from sdconvert.stages import StageContext

_LARGEST_FP32_ERROR = 1e-5


def run(context: StageContext) -> dict[str, Any]:
    """Do the stage's work; see `Stage.run`."""
    quantized = QuantizeArtifact(context.run.stage_folder("30-quantize"))
    data = CalibrationArtifact(context.run.stage_folder("20-calibration"))
    pipe = CheckpointArtifact(context.run.stage_folder("10-checkpoint")).pipeline()
    adapters = graph_adapters(pipe, context.recipe.pipeline.conditioning_scale)
    inputs = _chosen(data, "controlnet")
    run_both = partial(run_pair, adapters["unet"], adapters["controlnet"], context.recipe.pipeline.conditioning_scale)
    references = [run_both(one) for one in inputs]
    metrics: dict[str, Any] = {}
    for done, graph in enumerate(GRAPHS):
        context.report.step(done, len(GRAPHS), graph)
        summary = convert_folder(quantized.graph_folder(graph), context.out / graph)
        metrics[f"{graph}_heads"] = summary.heads
        metrics |= _verify(adapters[graph], data, quantized, Mha2ShaArtifact(context.out))
    # Both models have their SHA form by now: each alone is right, and so must be what they do together.
    errors = [_relative_error(mha, run_both(one)) for mha, one in zip(references, inputs, strict=True)]
    _require_small("the UNet behind its ControlNet", errors)
    return metrics | {"pair_fp32_relative_error": max(errors)}


def _chosen(data: CalibrationArtifact, graph: str) -> list[Tensors]:
    """The first and last calibration input of a graph, and a held-out one."""
    samples = list(data.calibration(graph))
    return [samples[0], samples[-1], next(iter(data.evaluation(graph)))]


def _relative_error(reference: Tensor, value: Tensor) -> float:
    return max_abs(reference, value) / float(reference.abs().max())


def _require_small(what: str, errors: Sequence[float]) -> None:
    # NaN is no small error, and `max` may pass over it.
    if large := [error for error in errors if not error <= _LARGEST_FP32_ERROR]:
        raise QualityGateError(
            f"{what}: SHA differs from MHA by {large[0]:.1e} relative in fp32 (allowed {_LARGEST_FP32_ERROR:.0e})",
            hint="the rewrite is wrong for this model; please report it with its config.json",
        )


def _verify(
    adapter: ModelAdapter, data: CalibrationArtifact, quantized: QuantizeArtifact, converted: Mha2ShaArtifact
) -> dict[str, float]:
    """Compare the two forms in fp32 and quantized, on the first and last calibration input and a held-out one."""
    graph = adapter.graph_name
    inputs = _chosen(data, graph)
    mha = quantized.simulation(graph, adapter, inputs[0])
    references = [(adapter.run(one), mha(one)) for one in inputs]
    sha = converted.simulation(graph, adapter, inputs[0], quantized.settings())
    errors, agreement = [], []
    for one, (fp32, simulated) in zip(inputs, references, strict=True):
        rewritten = adapter.run(one)
        errors += [_relative_error(fp32[name], rewritten[name]) for name in fp32]
        agreement.append(worst_sqnr_db(simulated, sha(one)))
    _require_small(graph, errors)
    return {f"{graph}_fp32_relative_error": max(errors), f"{graph}_quantized_sha_vs_mha_db": min(agreement)}
