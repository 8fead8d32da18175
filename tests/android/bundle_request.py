"""A complete request for a bundle, which tests change in one point at a time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdconvert.android.bundle import Sample, write_bundle
from sdconvert.qnn.context import Context


@dataclass(frozen=True)
class BundleRequest:
    """What `write_bundle` is asked for."""

    contexts: list[Context]
    samples: list[Sample]

    def write(self, out: Path, **changes: Any) -> Path:
        request: dict[str, Any] = {
            "model": "gate-test",
            "contexts": self.contexts,
            "samples": self.samples,
            "scheduler": {"class": "DDIMScheduler", "config": {"prediction_type": "v_prediction"}, "timesteps": [999]},
            "metrics": {"gate": {"sqnr_sim_vs_fp32_db": 80.0}},
        }
        write_bundle(out, **request | changes)
        return out
