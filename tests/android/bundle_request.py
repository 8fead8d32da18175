"""A complete request for a bundle, which tests change in one point at a time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdconvert.android.bundle import Sample, write_bundle
from sdconvert.qnn.context import Context

# Quantized at its border and inside, as every exported graph is; the scales hold [-4, 4] and [0, 1].
GATE = """
<ir_version: 10, opset_import: ["": 21]>
gate (float[1,3,8,8] latent, float[1,3,8,8] residual) => (float[1,3,8,8] out_sample)
<float s = {0.000122072}, uint16 z = {32768}, float u = {0.0000152590}, uint16 o = {0}>
{
    lq = QuantizeLinear(latent, s, z)
    l = DequantizeLinear(lq, s, z)
    rq = QuantizeLinear(residual, s, z)
    r = DequantizeLinear(rq, s, z)
    g = Sigmoid(r)
    gq = QuantizeLinear(g, u, o)
    gd = DequantizeLinear(gq, u, o)
    m = Mul(l, gd)
    mq = QuantizeLinear(m, s, z)
    out_sample = DequantizeLinear(mq, s, z)
}
"""


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
