"""Many samples through one pipeline, phase after phase, so that every model is brought in once and then dropped.

Units that need neither UNet nor ControlNet run ahead: text encoder and VAE do their work for all samples, what they
made is kept on the disk, and only the models of the sampling loop stay for its many steps. What the loop of a sample
has given is kept under `scratch`: an interrupted run goes on behind it.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sdconvert.calibration.spill import InputsSpill, Sides
from sdconvert.io.tensors import load_tensors, save_tensors
from sdconvert.pipelines.base import BasePipeline
from sdconvert.pipelines.graph import PipelineUnitGraph
from sdconvert.pipelines.loop import DenoisingLoop
from sdconvert.pipelines.unit import PipelineUnit

Progress = Callable[[str], None]


def plan_phases(pipe: BasePipeline) -> list[tuple[PipelineUnit, ...]]:
    """The units in an order that gives the same, cut where the models change; the models of the loop come late."""
    ahead, with_the_loop = PipelineUnitGraph(pipe.all_units).split_pipeline_units(pipe.in_iteration_models)
    return [*PipelineUnitGraph(ahead).phases(), *PipelineUnitGraph(with_the_loop).phases()]


@torch.no_grad()
def run_phases(
    pipe: BasePipeline,
    samples: Mapping[str, Sides],
    *,
    scratch: Path,
    progress: Progress = lambda note: None,
    commit: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Run every sample through the pipeline.

    Args:
        pipe: With a residency, which brings in the models of a phase and drops those of the one before.
        samples: The three dictionaries of each request, as `pipe.inputs` gives them.
        scratch: Keeps what the loops gave; a run that finds it there does not sample again.
        progress: Told what is done next.
        commit: Called whenever a sample has run through a phase, before `scratch` says so: what its observer
            collected is to be kept now.

    Returns:
        The picture (3, H, W) of every sample.

    Raises:
        MissingModelError: A model that a sample needs is not loaded.
        BudgetError: Models that are called together exceed the residency's limit; nothing has been computed then.
        ResidencyError: A unit calls a model that it does not declare.
    """
    for inputs in samples.values():
        pipe.require_models_of_run(*inputs)
    pipe.require_fit()
    scratch.mkdir(parents=True, exist_ok=True)
    with _work_folder(scratch / "phases") as folder:
        spill = InputsSpill(folder)
        for name, inputs in samples.items():
            spill.put(name, inputs)
        for phase in plan_phases(pipe):
            for name in samples:
                progress(f"{name}: {', '.join(unit.name for unit in phase)}")
                _run_phase(pipe, phase, name, spill, scratch, commit)
        return {name: spill.get(name)[0][pipe.output_param][0].clone() for name in samples}


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """An empty folder for as long as it is needed; what a killed process left there goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _run_phase(
    pipe: BasePipeline,
    phase: tuple[PipelineUnit, ...],
    name: str,
    spill: InputsSpill,
    scratch: Path,
    commit: Callable[[], None],
) -> None:
    kept = scratch / f"{name}.safetensors"
    inputs = spill.get(name)
    for unit in phase:
        if not isinstance(unit, DenoisingLoop):
            inputs = pipe.run_units((unit,), *inputs)
        elif kept.is_file():
            inputs = _restore(inputs, kept)
        else:
            inputs = pipe.run_units((unit,), *inputs)
            commit()
            state = inputs[0]["generator"].get_state()
            save_tensors({"latents": inputs[0]["latents"], "generator": state}, kept)
    spill.put(name, inputs)
    commit()


def _restore(inputs: Sides, kept: Path) -> Sides:
    """What `inputs` are after the loop, which leaves latents and a generator that has been drawn from."""
    shared, posi, nega = inputs
    tensors = load_tensors(kept)
    shared["generator"].set_state(tensors["generator"])
    return {**shared, "latents": tensors["latents"]}, posi, nega
