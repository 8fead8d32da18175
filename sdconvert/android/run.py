"""The work of `70-android`: gather what earlier stages made, write the bundle, and read it back."""

from typing import Any

from sdconvert.adapters.schedulers import scheduler_spec
from sdconvert.android.artifact import BUNDLE, tar_path
from sdconvert.android.bundle import Sample, write_bundle
from sdconvert.android.loop_files import Loop, LoopStep
from sdconvert.android.manifest import ChainRecord
from sdconvert.android.verify import verify_bundle
from sdconvert.calibration.artifact import CalibrationArtifact
from sdconvert.checkpoint.artifact import CheckpointArtifact
from sdconvert.export.artifact import ExportArtifact
from sdconvert.pipelines.sampling import sampling_arguments
from sdconvert.qnn.artifact import QnnArtifact
from sdconvert.stages import StageContext


def run(context: StageContext) -> dict[str, Any]:
    """Do the stage's work; see `Stage.run`."""
    recipe = context.recipe
    exported = ExportArtifact(context.run.stage_folder("50-export"))
    compiled = QnnArtifact(context.run.stage_folder("60-qnn"))
    checkpoint = CheckpointArtifact(context.run.stage_folder("10-checkpoint"))
    data = CalibrationArtifact(context.run.stage_folder("20-calibration"))
    folder = context.out / BUNDLE
    context.report.step(0, 2, "write")
    manifest = write_bundle(
        folder,
        model=recipe.name,
        contexts=list(compiled.contexts.values()),
        samples=_samples(exported, compiled),
        chains=_chains(exported),
        scheduler=scheduler_record(checkpoint.scheduler(), recipe.pipeline.num_inference_steps),
        metrics=compiled.figures,
        loop=_loop(checkpoint, data, compiled, sampling_arguments(recipe)),
    )
    context.report.step(1, 2, "read back")
    verify_bundle(tar_path(folder))
    size = tar_path(folder).stat().st_size
    return {
        "files": len(manifest.files),
        "tar_bytes": size,
        "note": f"{len(manifest.files)} files, {size / 1e6:.1f} MB",
    }


def scheduler_record(scheduler: Any, num_inference_steps: int) -> dict[str, Any]:
    """What the bundle says of the sampler: its class and configuration for people, its table for the device's loop.

    Raises:
        UnsupportedSchedulerError: No table expresses it.
    """
    spec = scheduler_spec(scheduler, num_inference_steps)
    return {
        "class": spec.scheduler,
        "config": {key: value for key, value in scheduler.config.items() if not key.startswith("_")},
        "timesteps": list(spec.timesteps),
        "table": spec.model_dump(mode="json"),
    }


def _chains(exported: ExportArtifact) -> list[ChainRecord]:
    found = []
    for graph in exported.graphs():
        if parts := tuple(part.name for part in exported.parts(graph)):
            outputs = tuple(tensor.name for tensor in exported.io(graph) if tensor.kind == "output")
            found.append(ChainRecord(name=graph, parts=parts, outputs=outputs))
    return found


def _loop(
    checkpoint: CheckpointArtifact, data: CalibrationArtifact, compiled: QnnArtifact, arguments: dict[str, Any]
) -> Loop:
    """Gather what the simulator drew, and beside it what fp32 drew and was given in every step."""
    drawn, crops = compiled.pictures(), data.pictures()
    given: dict[str, list[tuple[int, dict[str, Any]]]] = {name: [] for name in drawn}
    for info, inputs in data.evaluation("controlnet").samples():
        given[info.picture].append((info.step, inputs))
    return Loop(
        model=checkpoint.model_folder,
        arguments=arguments,
        simulated_soc=next(soc for _, soc in compiled.contexts),
        pictures={
            name: {key: crops[name][key] for key in ("low_resolution", "fp32")} | {"simulator": picture}
            for name, picture in drawn.items()
        },
        steps={
            name: [
                LoopStep(step, inputs, told["fp32"], told["simulator"])
                for (step, inputs), told in zip(given[name], steps, strict=True)
            ]
            for name, steps in compiled.steps().items()
        },
    )


def _samples(exported: ExportArtifact, compiled: QnnArtifact) -> list[Sample]:
    socs = {soc for _, soc in compiled.contexts}
    samples = []
    for graph in exported.compiled_graphs():
        simulated = {soc: compiled.simulated(graph, soc) for soc in sorted(socs)}
        for index, (inputs, fp32, _) in enumerate(exported.answers(graph)):
            answers = {soc: results[index] for soc, results in simulated.items()}
            samples.append(Sample(f"{graph}-{index}", graph, inputs, fp32, answers))
    return samples
