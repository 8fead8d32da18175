"""The work of `20-calibration`: sample every photograph once in fp32 and keep what the graphs were given."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdconvert.adapters import ModelAdapter
from sdconvert.calibration.photographs import photograph_file
from sdconvert.calibration.store import ActivationWriter
from sdconvert.checkpoint.artifact import CheckpointArtifact
from sdconvert.config import Recipe
from sdconvert.errors import UsageError
from sdconvert.io.degradation import degrade, enlarge
from sdconvert.io.images import read_image
from sdconvert.io.tensors import save_tensors
from sdconvert.metrics import psnr_y, ssim_y
from sdconvert.pipelines.backend import graph_adapters
from sdconvert.pipelines.pasd import PASDPipeline
from sdconvert.pipelines.sampling import sampling_arguments
from sdconvert.stages import StageContext

_TILES_PER_SIDE = 2


def run(context: StageContext) -> dict[str, Any]:
    """Do the stage's work; see `Stage.run`."""
    recipe = context.recipe
    pipe = CheckpointArtifact(context.run.stage_folder("10-checkpoint")).pipeline()
    tile = recipe.pipeline.latent_tile * pipe.vae_scale_factor
    crops = _calibration_crops(recipe, tile)
    total = len(crops) + 2 * len(recipe.calibration.held_out)
    adapters = graph_adapters(pipe, recipe.pipeline.conditioning_scale)

    calibration = _Capture(context.out / "calibration", adapters)
    for done, (name, crop) in enumerate(crops.items()):
        context.report.step(done, total, name)
        calibration.picture = name
        pipe(_low_resolution(crop, recipe), **sampling_arguments(recipe), observer=calibration)
    calibration.close()

    evaluation = _Capture(context.out / "evaluation", adapters)
    metrics: dict[str, Any] = {"calibration_samples": len(crops) * recipe.pipeline.num_inference_steps}
    for name, crop in _held_out_crops(recipe, tile, pipe.vae_scale_factor).items():
        context.report.step(done := done + 1, total, name)
        evaluation.picture = name
        metrics |= _run_held_out(pipe, recipe, name, crop, context.out, evaluation)
    evaluation.close()
    return metrics


class _Capture:
    """Observer of the pipeline that keeps each graph's inputs; one tile per picture is enough to evaluate."""

    def __init__(self, folder: Path, adapters: Mapping[str, ModelAdapter]) -> None:
        self._adapters = adapters
        self._writers = {graph: ActivationWriter(folder / graph) for graph in adapters}
        self.picture = ""

    def record(self, component: str, inputs: dict[str, Any], *, step: int, side: str, tile: int) -> None:
        if component in self._writers:
            packed = self._adapters[component].pack(inputs)
            self._writers[component].add(packed, picture=self.picture, step=step, side=side, tile=tile)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


def _run_held_out(
    pipe: PASDPipeline, recipe: Recipe, name: str, original: Tensor, out: Path, capture: _Capture
) -> dict[str, float]:
    low = _low_resolution(original, recipe)
    observer = capture if name.endswith("-tile") else None
    fp32 = pipe(low, **sampling_arguments(recipe), observer=observer)
    bicubic = enlarge(low)
    pictures = {"original": original, "low_resolution": low, "bicubic": bicubic, "fp32": fp32}
    (out / "pictures").mkdir(exist_ok=True)
    save_tensors(pictures, out / "pictures" / f"{name}.safetensors")
    if observer is not None:
        return {}
    return {
        f"{name}_{method}_{figure}": function(original, picture)
        for method, picture in (("bicubic", bicubic), ("fp32", fp32))
        for figure, function in (("psnr_y_db", psnr_y), ("ssim_y", ssim_y))
    }


def _low_resolution(picture: Tensor, recipe: Recipe) -> Tensor:
    return degrade(picture, recipe.pipeline.seed)


def _calibration_crops(recipe: Recipe, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(recipe.pipeline.seed)
    crops = {}
    for name in recipe.calibration.photographs:
        picture = _photograph(name, size)
        for index in range(recipe.calibration.crops_per_photograph):
            top, left = (int(torch.randint(extent - size + 1, (), generator=generator)) for extent in picture.shape[1:])
            crops[f"{Path(name).stem}-{index}"] = picture[:, top : top + size, left : left + size]
    return crops


def _held_out_crops(recipe: Recipe, tile: int, factor: int) -> dict[str, Tensor]:
    """The middle of each photograph, some tiles large, and the first tile of that."""
    size = _TILES_PER_SIDE * tile - (_TILES_PER_SIDE - 1) * recipe.pipeline.latent_overlap * factor
    crops = {}
    for name in recipe.calibration.held_out:
        picture = _photograph(name, size)
        top, left = ((extent - size) // 2 for extent in picture.shape[1:])
        crop = picture[:, top : top + size, left : left + size]
        stem = Path(name).stem
        crops[stem] = crop
        crops[f"{stem}-tile"] = crop[:, :tile, :tile]
    return crops


def _photograph(name: str, size: int) -> Tensor:
    picture = read_image(photograph_file(name))
    if min(picture.shape[1:]) < size:
        raise UsageError(
            f"photograph `{name}` is {picture.shape[2]}x{picture.shape[1]}, smaller than a crop of {size} pixels",
            hint="choose a larger photograph, or a smaller pipeline.latent_tile",
        )
    return picture
