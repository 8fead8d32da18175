"""What the calibration stage leaves: graph inputs for calibration and for evaluation, and pictures."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sdconvert.calibration.store import ActivationStore
from sdconvert.io.tensors import load_tensors

__all__ = ["ActivationStore", "CalibrationArtifact"]


@dataclass(frozen=True)
class CalibrationArtifact:
    """The stage's folder."""

    folder: Path

    def calibration(self, graph: str) -> ActivationStore:
        """Inputs of a graph from the calibration photographs."""
        return ActivationStore(self.folder / "calibration" / graph)

    def evaluation(self, graph: str) -> ActivationStore:
        """Inputs of a graph from the held-out photographs, one latent tile each."""
        return ActivationStore(self.folder / "evaluation" / graph)

    def pictures(self) -> dict[str, dict[str, Tensor]]:
        """Of every held-out crop by name: `original`, `low_resolution`, `bicubic`, `fp32`, each (3, H, W) in [0, 1].

        `<photograph>` is several tiles large; `<photograph>-tile` exactly one.
        """
        return {path.stem: load_tensors(path) for path in sorted((self.folder / "pictures").glob("*.safetensors"))}
