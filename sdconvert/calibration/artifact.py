"""What the calibration stage leaves: graph inputs for calibration and for evaluation, and pictures."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sdconvert.calibration.crops import TILE
from sdconvert.calibration.store import ActivationStore, Tensors
from sdconvert.io.tensors import load_tensors

__all__ = ["TILE", "ActivationStore", "CalibrationArtifact"]


@dataclass(frozen=True)
class CalibrationArtifact:
    """The stage's folder."""

    folder: Path

    def calibration(self, graph: str, count: int | None = None) -> ActivationStore:
        """Inputs of a graph from the calibration photographs: all, or `count` spread over timesteps and pictures.

        Raises:
            UsageError: There are not as many.
        """
        store = ActivationStore(self.folder / "calibration" / graph)
        return store if count is None else store.spread(count)

    def evaluation(self, graph: str, count: int | None = None) -> ActivationStore:
        """Inputs of a graph from the held-out photographs, one latent tile each; all, or `count` of them as above."""
        store = ActivationStore(self.folder / "evaluation" / graph)
        return store if count is None else store.spread(count)

    def held_out(self, graph: str) -> list[Tensors]:
        """One input per held-out photograph: its first step, the next one's last, and so on, so that both kinds occur.

        Inputs are in the graph's order.
        """
        by_picture: dict[str, list[Tensors]] = {}
        for info, inputs in self.evaluation(graph).samples():
            by_picture.setdefault(info.picture, []).append(inputs)
        return [samples[-(index % 2)] for index, samples in enumerate(by_picture.values())]

    def pictures(self) -> dict[str, dict[str, Tensor]]:
        """Of every held-out crop by name: `original`, `low_resolution`, `bicubic`, `fp32`, each (3, H, W) in [0, 1].

        `<photograph>` is several tiles large; `<photograph>-tile` exactly one.
        """
        return {path.stem: load_tensors(path) for path in sorted((self.folder / "pictures").glob("*.safetensors"))}
