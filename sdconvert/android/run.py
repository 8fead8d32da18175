"""The work of `70-android`: gather what earlier stages made, write the bundle, and read it back."""

from typing import Any

from sdconvert.adapters.schedulers import scheduler_spec
from sdconvert.android.artifact import BUNDLE, tar_path
from sdconvert.android.bundle import Sample, write_bundle
from sdconvert.android.verify import verify_bundle
from sdconvert.checkpoint.artifact import CheckpointArtifact
from sdconvert.export.artifact import ExportArtifact
from sdconvert.qnn.artifact import QnnArtifact
from sdconvert.stages import StageContext


def run(context: StageContext) -> dict[str, Any]:
    """Do the stage's work; see `Stage.run`."""
    recipe = context.recipe
    exported = ExportArtifact(context.run.stage_folder("50-export"))
    compiled = QnnArtifact(context.run.stage_folder("60-qnn"))
    scheduler = CheckpointArtifact(context.run.stage_folder("10-checkpoint")).scheduler()
    folder = context.out / BUNDLE
    context.report.step(0, 2, "write")
    manifest = write_bundle(
        folder,
        model=recipe.name,
        contexts=list(compiled.contexts.values()),
        samples=_samples(exported, compiled),
        chains={
            graph: [part.name for part in parts] for graph in exported.graphs() if (parts := exported.parts(graph))
        },
        scheduler=scheduler_record(scheduler, recipe.pipeline.num_inference_steps),
        metrics=compiled.figures,
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


def _chains(exported: ExportArtifact) -> dict[str, list[str]]:
    chains = {graph: [part.name for part in exported.parts(graph)] for graph in exported.graphs()}
    return {graph: parts for graph, parts in chains.items() if parts}


def _samples(exported: ExportArtifact, compiled: QnnArtifact) -> list[Sample]:
    socs = {soc for _, soc in compiled.contexts}
    samples = []
    for graph in exported.compiled_graphs():
        simulated = {soc: compiled.simulated(graph, soc) for soc in sorted(socs)}
        for index, (inputs, fp32, _) in enumerate(exported.answers(graph)):
            answers = {soc: results[index] for soc, results in simulated.items()}
            samples.append(Sample(f"{graph}-{index}", graph, inputs, fp32, answers))
    return samples
