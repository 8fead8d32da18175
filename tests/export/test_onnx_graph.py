"""The exported graph: valid, static, quantized throughout, and what ONNX Runtime computes from it."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
import pytest
import torch
from diffusers.models.attention_processor import Attention
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from static_graphs import Case, golden_case, module_case, simulate, small_case, small_controlnet_case, vae_case

from sdconvert.export.marked import TENSOR_KEY
from sdconvert.export.onnx_graph import to_onnx
from sdconvert.export.runner import OnnxRunner
from sdconvert.metrics import worst_sqnr_db
from sdconvert.quantize import graph
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Simulation

Export = Callable[[Case, Simulation, Path], ModelProto]

# What the HTP computes as one op: a convolution's or product's bias, and x * sigmoid(x).
FUSED = {("MatMul", "Add"), ("Sigmoid", "Mul")}


@dataclass(frozen=True)
class Exported:
    """A case, its simulation, and the file made of it."""

    case: Case
    simulation: Simulation
    path: Path
    model: ModelProto

    def constant(self, name: str) -> npt.NDArray[Any]:
        """The value of an initializer."""
        (found,) = (tensor for tensor in self.model.graph.initializer if tensor.name == name)
        return numpy_helper.to_array(found)

    def producer(self, name: str) -> NodeProto:
        """The node that makes a tensor."""
        found: NodeProto
        (found,) = (node for node in self.model.graph.node if name in node.output)
        return found


@pytest.fixture(
    scope="module", params=[small_controlnet_case, vae_case, pytest.param(small_case, marks=pytest.mark.slow)]
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, export: Export) -> Exported:
    case = request.param()
    return write(case, simulate(case), tmp_path_factory, export)


@pytest.fixture(scope="module", params=[75, 69], ids=["v75", "v69"])
def attention(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, export: Export) -> Exported:
    """One attention layer, for a generation with 16-bit second operands and for one without."""
    torch.manual_seed(0)
    case = module_case(Attention(query_dim=16, heads=2, dim_head=8), 1, 32, 16)
    return write(case, simulate(case, request.param), tmp_path_factory, export)


def write(case: Case, simulation: Simulation, folders: pytest.TempPathFactory, export: Export) -> Exported:
    path = folders.mktemp("onnx") / f"{case.adapter.graph_name}.onnx"
    return Exported(case, simulation, path, export(case, simulation, path))


def test_graph_is_valid_and_alone_in_its_folder(exported: Exported) -> None:
    onnx.checker.check_model(str(exported.path), full_check=True)
    assert [path.name for path in exported.path.parent.iterdir()] == [exported.path.name]
    versions = {opset.domain: opset.version for opset in exported.model.opset_import}
    assert versions[""] >= 21
    assert {node.domain for node in exported.model.graph.node} == {""}


def test_inputs_and_outputs_have_the_graph_s_names_and_static_shapes(exported: Exported) -> None:
    graph = exported.model.graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*graph.input, *graph.output]}
    inputs = exported.case.samples[0]
    expected = {**inputs, **exported.case.adapter.run(inputs)}
    assert list(shapes) == list(expected)
    assert shapes == {name: list(tensor.shape) for name, tensor in expected.items()}
    assert {v.type.tensor_type.elem_type for v in [*graph.input, *graph.output]} == {TensorProto.FLOAT}
    for value in graph.value_info:
        for dimension in value.type.tensor_type.shape.dim:
            assert dimension.HasField("dim_value"), value.name


def test_nothing_of_the_exporting_machine_is_left(exported: Exported) -> None:
    assert b"site-packages" not in exported.path.read_bytes()
    nodes = exported.model.graph.node
    assert not any(node.doc_string for node in nodes)
    # What is left says which tensor of the simulation a node makes.
    assert {(node.op_type, entry.key) for node in nodes for entry in node.metadata_props} == {
        ("DequantizeLinear", TENSOR_KEY)
    }
    keys = {entry.value for node in nodes for entry in node.metadata_props}
    assert keys <= exported.simulation.encodings().activations.keys()


def float_edges(graph: onnx.GraphProto) -> Iterator[tuple[str, str]]:
    """Producer and consumer of every tensor that is computed and reaches an op, or an end, without Q/DQ."""
    producers = {name: node.op_type for node in graph.node for name in node.output}
    producers |= {value.name: "input" for value in graph.input}
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            yield from ((producers[name], node.op_type) for name in node.input if name in producers)
    yield from ((producers[value.name], "output") for value in graph.output)


def test_every_tensor_between_ops_is_quantized(exported: Exported) -> None:
    edges = Counter(float_edges(exported.model.graph))
    bare = {edge: count for edge, count in edges.items() if edge[0] != "DequantizeLinear"}
    assert bare.keys() <= FUSED
    assert edges["DequantizeLinear", "output"] == len(exported.model.graph.output)


def test_all_weights_are_integers(exported: Exported) -> None:
    """Convolutions' and linear layers' int8, norms' uint16; floats are scales, biases and single factors."""
    graph = exported.model.graph
    grids = {name for node in graph.node if node.op_type.endswith("izeLinear") for name in node.input[1:]}
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in grids}
    # Resize's factors must not be quantized.
    factors = {name for node in graph.node if node.op_type == "Resize" for name in node.input[1:]}
    floats = [t for t in constants.values() if t.data_type == TensorProto.FLOAT and t.name not in factors]
    assert {name for name in exported.case.adapter.model.state_dict() if name.endswith(".bias")} >= {
        tensor.name.removeprefix("model.") for tensor in floats if tensor.dims
    }
    types = Counter(tensor.data_type for tensor in constants.values())
    parameters = exported.simulation.encodings().parameters.values()
    per_tensor = sum(len(entries) == 1 for entries in parameters)
    assert types[TensorProto.INT8] == len(parameters) - per_tensor
    assert types[TensorProto.UINT16] == per_tensor
    assert types.keys() <= {TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT64}


def test_onnx_runtime_computes_what_the_simulation_computes(exported: Exported) -> None:
    runner = OnnxRunner(exported.path)
    for inputs in exported.case.samples:
        answer = runner(inputs)
        assert list(answer) == list(exported.simulation.output_names)
        assert worst_sqnr_db(exported.simulation(inputs), answer) >= 55


@pytest.mark.slow
def test_the_reference_s_unet_is_exported_whole(tmp_path: Path, export: Export) -> None:
    case = golden_case("unet")
    simulation = simulate(case)
    model = export(case, simulation, tmp_path / "unet.onnx")
    assert {edge for edge in float_edges(model.graph) if edge[0] != "DequantizeLinear"} <= FUSED
    assert worst_sqnr_db(simulation(case.samples[1]), OnnxRunner(tmp_path / "unet.onnx")(case.samples[1])) >= 55


def test_second_operands_of_matmul_are_of_the_generation_s_type(attention: Exported) -> None:
    v75 = attention.simulation.settings.name == "htp_v73"
    activations = attention.simulation.encodings().activations
    encodings = iter(entries[0] for key, entries in activations.items() if key.endswith(graph.SECOND))
    products = [node for node in attention.model.graph.node if node.op_type == "MatMul"]
    dynamic = [node for node in products if node.input[1].endswith("_second_qdq")]
    assert len(dynamic) == 2
    for node in dynamic:
        dequantize = attention.producer(node.input[1])
        quantize = attention.producer(dequantize.input[0])
        encoding = next(encodings)
        assert (quantize.op_type, dequantize.op_type) == ("QuantizeLinear", "DequantizeLinear")
        assert list(quantize.input[1:]) == list(dequantize.input[1:])
        scale, zero_point = (attention.constant(name) for name in quantize.input[1:])
        assert str(zero_point.dtype) == ("int16" if v75 else "uint8")
        assert int(zero_point) == (0 if v75 else -encoding["offset"])
        assert float(scale) == pytest.approx(encoding["scale"], rel=1e-6)
        assert str(attention.constant(attention.producer(node.input[0]).input[2]).dtype) == "uint16"


def test_attention_computes_what_its_simulation_computes(attention: Exported) -> None:
    for inputs in attention.case.samples:
        assert worst_sqnr_db(attention.simulation(inputs), OnnxRunner(attention.path)(inputs)) >= 60


def test_weights_between_two_steps_are_exported_as_simulated(tmp_path: Path, export: Export) -> None:
    """As weights of a half-precision checkpoint are: halfway up to the last bit of a float."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(64, 64)
    halves = torch.randint(-13, 14, (64, 64), generator=generator).float()
    halves[:, 0] = 14.0
    layer.weight.data = halves * (0.01 * torch.rand(64, 1, generator=generator) + 0.01)
    before = layer.weight.detach().clone()
    case = module_case(torch.nn.Sequential(layer), 1, 8, 64)
    settings = load_settings({75}).with_bitwidths(weight=4, activation=16, per_channel=True)
    simulation = Simulation(case.adapter, case.samples[0], settings)
    simulation.calibrate(case.samples)
    export(case, simulation, tmp_path / "ties.onnx")
    assert worst_sqnr_db(simulation(case.samples[0]), OnnxRunner(tmp_path / "ties.onnx")(case.samples[0])) > 80
    assert torch.equal(layer.weight, before)


def test_exporting_leaves_the_simulation_as_it_was(attention: Exported) -> None:
    inputs = attention.case.samples[0]
    again = simulate(attention.case, attention.simulation.settings.architectures[0])
    assert torch.equal(attention.simulation(inputs)["y"], again(inputs)["y"])
    assert attention.simulation.encodings() == again.encodings()


def test_the_exporter_reports_nothing_on_stdout(attention: Exported, capfd: pytest.CaptureFixture[str]) -> None:
    to_onnx(attention.simulation, attention.case.samples[0], opset=21)
    assert capfd.readouterr().out == ""
