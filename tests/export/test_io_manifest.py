"""Inputs and outputs of a graph: written down as they are, or refused."""

from collections.abc import Callable

import pytest
import torch
from onnx import ModelProto, TensorProto
from static_graphs import module_case, simulate
from torch import nn

from sdconvert.errors import SdconvertError
from sdconvert.export.io_manifest import describe_io
from sdconvert.export.onnx_graph import to_onnx
from sdconvert.quantize.simulation import Simulation


@pytest.fixture(scope="module")
def graph() -> tuple[Simulation, ModelProto]:
    torch.manual_seed(0)
    case = module_case(nn.Sequential(nn.Conv2d(4, 8, 3), nn.SiLU()), 1, 4, 6, 6)
    simulation = simulate(case)
    return simulation, to_onnx(simulation, case.samples[0], opset=21)


def test_names_shapes_and_grids_are_the_simulation_s(graph: tuple[Simulation, ModelProto]) -> None:
    simulation, model = graph
    x, y = describe_io(model, "module")
    activations = simulation.encodings().activations
    for tensor, key, kind in ((x, ":x", "input"), (y, "1:silu.0", "output")):
        (entry,) = activations[key]
        assert (tensor.kind, tensor.dtype, tensor.quantized) == (kind, "float32", "uint16")
        assert tensor.zero_point == -entry["offset"]
        assert tensor.scale == pytest.approx(entry["scale"])
        assert tensor.lowest == pytest.approx(entry["min"])
        assert tensor.highest == pytest.approx(entry["max"])
    assert (x.name, x.shape, y.name, y.shape) == ("x", (1, 4, 6, 6), "y", (1, 8, 4, 4))


def rename(model: ModelProto) -> None:
    model.graph.input[0].name = "x.1"


def flatten(model: ModelProto) -> None:
    del model.graph.input[0].type.tensor_type.shape.dim[:]


def open_batch(model: ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def halve(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def leave_floating(model: ModelProto) -> None:
    for node in model.graph.node:
        if node.input[0] == "x":
            node.op_type = "Identity"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (rename, r"input `x\.1` of the module graph has a name that runners rewrite"),
        (flatten, r"input `x` of the module graph has the shape \[\]"),
        (open_batch, r"output `y` of the module graph has the shape \[0, 8, 4, 4\]"),
        (halve, "input `x` of the module graph is float16"),
        (leave_floating, "input `x` of the module graph is not quantized"),
    ],
)
def test_what_goes_wrong_in_the_field_is_refused(
    graph: tuple[Simulation, ModelProto], spoil: Callable[[ModelProto], None], message: str
) -> None:
    model = ModelProto()
    model.CopyFrom(graph[1])
    spoil(model)
    with pytest.raises(SdconvertError, match=message) as error:
        describe_io(model, "module")
    assert error.value.hint
