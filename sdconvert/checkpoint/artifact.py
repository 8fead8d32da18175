"""What the checkpoint stage leaves for later ones: a diffusers folder that is known to load."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdconvert.pipelines.loading import load_scheduler
from sdconvert.pipelines.pasd import PASDPipeline
from sdconvert.pipelines.residency import ModelResidency


@dataclass(frozen=True)
class CheckpointArtifact:
    """The stage's folder."""

    folder: Path

    @property
    def model_folder(self) -> Path:
        """The diffusers folder."""
        return self.folder / "model"

    def scheduler(self) -> Any:
        """The sampler alone, as diffusers reads it."""
        return load_scheduler(self.model_folder)

    def pipeline(self, residency: ModelResidency | None = None) -> PASDPipeline:
        """Load it anew, in fp32; given `residency`, weights stay on the disk until a unit calls for them."""
        return PASDPipeline.from_pretrained(self.model_folder, residency=residency)
