"""AIMET itself takes the weights and encodings, and computes what we computed."""

from pathlib import Path

import pytest
import torch
from adaround_graphs import int4_grids
from aimet_torch import QuantizationSimModel
from static_graphs import module_case
from torch import Tensor, nn

from sdconvert.io.encodings import write_params
from sdconvert.quantize import graph
from sdconvert.quantize.adaround.run import AdaRoundSettings, adaround
from sdconvert.quantize.adaround.solve import SolverSettings


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("refit", [False, True])
def test_aimet_freezes_our_encodings_and_keeps_our_codes(tmp_path: Path, refit: bool) -> None:
    torch.manual_seed(0)
    case = module_case(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 1)), 1, 3, 6, 6)
    traced = graph.trace(case.adapter, case.samples[0])
    model = case.adapter.model
    grids = int4_grids(traced)
    settings = AdaRoundSettings(solver=SolverSettings(refit_scale=refit))
    result = adaround(traced, case.samples, grids, settings, tmp_path / "adaround")
    weights = dict(result.weights())
    model.load_state_dict({**model.state_dict(), **weights})
    write_params(tmp_path / "parameters_mha.encodings", result.encodings())
    dummy: Tensor = case.samples[0]["x"]
    sim = QuantizationSimModel(model, (dummy,), default_param_bw=4, default_output_bw=16)
    sim.set_and_freeze_param_encodings(str(tmp_path / "parameters_mha.encodings"))
    sim.compute_encodings(lambda module: module(dummy))
    for path, module in sim.named_qmodules():
        if f"{path}.weight" in weights:
            with torch.no_grad():
                again = module.param_quantizers["weight"](module.weight).as_subclass(Tensor)
            torch.testing.assert_close(again, weights[f"{path}.weight"], rtol=1e-6, atol=1e-7)
            weights.pop(f"{path}.weight")
    assert not weights
