"""The work of `70-android`: gather what earlier stages made, write the bundle, and read it back."""

from typing import Any

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
    scheduler.set_timesteps(recipe.pipeline.num_inference_steps)
    folder = context.out / BUNDLE
    context.report.step(0, 2, "write")
    manifest = write_bundle(
        folder,
        model=recipe.name,
        contexts=list(compiled.contexts.values()),
        samples=_samples(exported, compiled),
        scheduler={
            "class": type(scheduler).__name__,
            "config": {key: value for key, value in scheduler.config.items() if not key.startswith("_")},
            "timesteps": scheduler.timesteps.tolist(),
        },
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


def _samples(exported: ExportArtifact, compiled: QnnArtifact) -> list[Sample]:
    socs = {soc for _, soc in compiled.contexts}
    samples = []
    for graph in exported.graphs():
        simulated = {soc: compiled.simulated(graph, soc) for soc in sorted(socs)}
        for index, (inputs, fp32, _) in enumerate(exported.answers(graph)):
            answers = {soc: results[index] for soc, results in simulated.items()}
            samples.append(Sample(f"{graph}-{index}", graph, inputs, fp32, answers))
    return samples
