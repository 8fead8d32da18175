"""A defect of the compiler, pinned with its cure: LayerNorm over exactly 16 rows before a product is garbage.

QAIRT 2.51. When the first assertion begins to fail, the compiler has been mended and the rewrite can go.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from onnx import ModelProto
from static_graphs import Case, module_case, simulate
from torch import nn

from sdconvert.metrics import worst_sqnr_db
from sdconvert.qnn.context import compile_context
from sdconvert.qnn.simulator import Simulator
from sdconvert.quantize import graph
from sdconvert.quantize.simulation import Simulation
from sdconvert.soc import find_soc

Export = Callable[[Case, Simulation, Path], ModelProto]


def htp_vs_simulation_db(folder: Path, export: Export, rows: int) -> float:
    torch.manual_seed(0)
    case = module_case(nn.Sequential(nn.LayerNorm(96), nn.Linear(96, 32)), 1, rows, 96)
    simulation = simulate(case)
    export(case, simulation, folder / "norm.onnx")
    context = compile_context(folder / "norm.onnx", folder, find_soc("SM8650"))
    return worst_sqnr_db(simulation(case.samples[0]), Simulator(context.ctx_onnx)(case.samples[0]))


def test_layer_norm_of_sixteen_rows_computes_what_the_simulation_says(tmp_path: Path, export: Export) -> None:
    assert htp_vs_simulation_db(tmp_path, export, rows=16) >= 60


def test_the_rewrite_is_what_makes_it_so(tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_reshape_sixteen_row_layer_norms", lambda graph_module: None)
    (tmp_path / "16").mkdir()
    assert htp_vs_simulation_db(tmp_path / "16", export, rows=16) < 10
    (tmp_path / "17").mkdir()
    assert htp_vs_simulation_db(tmp_path / "17", export, rows=17) >= 60
