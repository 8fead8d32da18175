"""The work of `20-calibration`: sample every photograph once in fp32 and keep what the graphs were given."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sdconvert.adapters import ModelAdapter
from sdconvert.calibration.crops import TILE, calibration_crops, held_out_crops
from sdconvert.calibration.phases import plan_phases, run_phases
from sdconvert.calibration.spill import Sides
from sdconvert.calibration.store import ActivationWriter
from sdconvert.checkpoint.artifact import CheckpointArtifact
from sdconvert.config import Recipe
from sdconvert.io.degradation import degrade, enlarge
from sdconvert.io.tensors import save_tensors
from sdconvert.metrics import psnr_y, ssim_y
from sdconvert.pipelines.backend import graph_adapters
from sdconvert.pipelines.pasd import PASDPipeline
from sdconvert.pipelines.residency import ModelResidency
from sdconvert.pipelines.sampling import sampling_arguments
from sdconvert.stages import StageContext

_PURPOSES = ("calibration", "evaluation")


def run(context: StageContext) -> dict[str, Any]:
    """Do the stage's work; see `Stage.run`."""
    recipe = context.recipe
    residency = ModelResidency(folder=context.scratch / "models", memory_limit=recipe.calibration.memory_limit)
    pipe = CheckpointArtifact(context.run.stage_folder("10-checkpoint")).pipeline(residency)
    tile = recipe.pipeline.latent_tile * pipe.vae_scale_factor
    held_out = held_out_crops(recipe, tile, pipe.vae_scale_factor)
    crops = dict(zip(_PURPOSES, (calibration_crops(recipe, tile), held_out), strict=True))
    low = {
        f"{purpose}.{name}": _low_resolution(one, recipe) for purpose in crops for name, one in crops[purpose].items()
    }

    adapters = graph_adapters(pipe, recipe.pipeline.conditioning_scale)
    writers = {
        purpose: {graph: ActivationWriter(context.scratch / purpose / graph, resume=True) for graph in adapters}
        for purpose in _PURPOSES
    }

    prompts = dict(zip(crops["calibration"], itertools.cycle(recipe.calibration.prompts), strict=False))

    def request(sample: str) -> Sides:
        purpose, _, picture = sample.partition(".")
        arguments = sampling_arguments(recipe)
        if purpose == "calibration":
            arguments["prompt"] = prompts[picture]
        shared, posi, nega = pipe.inputs(low[sample], **arguments)
        if purpose == "calibration" or picture.endswith(TILE):  # one tile per photograph is enough to evaluate
            shared["observer"] = _Capture(adapters, writers[purpose], picture)
        return shared, posi, nega

    def commit() -> None:
        for one in _PURPOSES:
            for writer in writers[one].values():
                writer.commit()

    steps = _Steps(context, len(plan_phases(pipe)) * len(low))
    fp32 = run_phases(
        pipe,
        {sample: request(sample) for sample in low},
        scratch=context.scratch / "loops",
        progress=steps.next,
        commit=commit,
    )
    for purpose in _PURPOSES:
        for graph, writer in writers[purpose].items():
            writer.publish(context.out / purpose / graph)
    (context.out / "pictures").mkdir()
    metrics: dict[str, Any] = {"calibration_samples": len(crops["calibration"]) * recipe.pipeline.num_inference_steps}
    for name, original in held_out.items():
        sample = f"evaluation.{name}"
        metrics |= _judge(name, original, low[sample], fp32[sample], context.out / "pictures")
    return metrics | record_sizes(pipe, recipe, {name: low[f"evaluation.{name}"] for name in held_out})


def record_sizes(pipe: PASDPipeline, recipe: Recipe, low: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes asked for and sizes that the networks see, and what to expect of them, for the report."""
    section = recipe.pipeline
    shapes = {
        name: pipe.sampling_shape(
            *picture.shape[1:],
            upscale=section.upscale,
            latent_tile=section.latent_tile,
            latent_overlap=section.latent_overlap,
        )
        for name, picture in low.items()
    }
    warnings = {name: warning for name, shape in shapes.items() if (warning := pipe.size_warning(shape))}
    return {
        "sizes": {name: shape.as_record() for name, shape in shapes.items()},
        "warnings": [f"{name}: {warning}" for name, warning in warnings.items()],
    }


class _Steps:
    """Counts the parts of the stage's work."""

    def __init__(self, context: StageContext, total: int) -> None:
        self._context, self._total, self._done = context, total, 0

    def next(self, note: str) -> None:
        self._context.report.step(self._done, self._total, note)
        self._done += 1


class _Capture:
    """Observer of one sample that keeps each graph's inputs."""

    def __init__(
        self, adapters: Mapping[str, ModelAdapter], writers: Mapping[str, ActivationWriter], picture: str
    ) -> None:
        self._adapters, self._writers, self._picture = adapters, writers, picture

    def record(self, component: str, inputs: dict[str, Any], *, step: int, side: str, tile: int) -> None:
        if component in self._writers:
            packed = self._adapters[component].pack(inputs)
            self._writers[component].add(packed, picture=self._picture, step=step, side=side, tile=tile)


def _judge(name: str, original: Tensor, low: Tensor, fp32: Tensor, folder: Path) -> dict[str, float]:
    """Write the pictures of a held-out crop; measure those of more than one tile."""
    bicubic = enlarge(low)
    pictures = {"original": original, "low_resolution": low, "bicubic": bicubic, "fp32": fp32}
    save_tensors(pictures, folder / f"{name}.safetensors")
    if name.endswith(TILE):
        return {}
    return {
        f"{name}_{method}_{figure}": function(original, picture)
        for method, picture in (("bicubic", bicubic), ("fp32", fp32))
        for figure, function in (("psnr_y_db", psnr_y), ("ssim_y", ssim_y))
    }


def _low_resolution(picture: Tensor, recipe: Recipe) -> Tensor:
    return degrade(picture, recipe.pipeline.seed)
