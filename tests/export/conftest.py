"""ONNX files of simulations, written as the export stage writes them."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto
from static_graphs import Case

from sdconvert.export.onnx_graph import to_onnx
from sdconvert.quantize.simulation import Simulation

Export = Callable[[Case, Simulation, Path], ModelProto]


@pytest.fixture(scope="session")
def export() -> Export:
    """Write a simulation to a path, and return what was written."""

    def write(case: Case, simulation: Simulation, path: Path) -> ModelProto:
        model = to_onnx(simulation, case.samples[0], opset=21)
        onnx.save(model, str(path))
        return model

    return write
