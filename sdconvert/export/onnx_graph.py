"""A simulation as ONNX: the graph by PyTorch's exporter, Q/DQ pairs by the ranges of the simulation.

The exporter sees one opaque marker where a quantizer stands, so nothing is merged across it. Then each marker becomes a
pair, or the integers of a weight with their DequantizeLinear. AIMET's own exporter has PyTorch trace the arithmetic of
every quantizer and finds it again in the result: the same file, for several times the time.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from onnx import ModelProto
from torch import Tensor

from sdconvert.adapters import Tensors
from sdconvert.errors import SdconvertError
from sdconvert.export.marked import export_marked, finish, markers
from sdconvert.export.origin import TENSOR_KEY
from sdconvert.io.encodings import Encoding
from sdconvert.quantize.artifact import SECOND, Encodings, Simulation, WeightGrid

# What moves values has no quantizer of its own; the compiler wants a pair on both sides, with one grid.
_MOVES = {"Expand", "Flatten", "Gather", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}


def to_onnx(simulation: Simulation, example: Tensors, *, opset: int) -> ModelProto:
    """Make ONNX of a simulation: every activation quantizer a Q/DQ pair, weights as integers with a DQ, biases float.

    QNN's provider makes int32 of biases, with the product of input and weight scale. The second operand of a MatMul has
    a second pair, directly before the MatMul: without it the provider turns uint16 there into uint8 silently (84 -> 41
    dB); int16 with zero point 0 keeps all 16 bits on v73 and later.

    Args:
        simulation: With ranges.
        example: One set of graph inputs; their shapes are the model's.
        opset: At least 21, which has 16-bit Q/DQ.

    Raises:
        PreconditionError: The simulation has no ranges.
        SdconvertError: The exporter lost a weight's place.
    """
    encodings = simulation.encodings()
    model = export_marked(simulation, example, opset)
    for key, marker in markers(model.graph):
        _replace_marker(model.graph, marker, key, encodings)
    for node in [node for node in model.graph if node.op_type in _MOVES]:
        _pass_grid_on(model.graph, node)
    return finish(model)


def _replace_marker(graph: ir.Graph, marker: ir.Node, key: str, encodings: Encodings) -> None:
    source = marker.inputs[0]
    assert source is not None  # a marker has one input
    if source.is_initializer():
        _store(graph, marker, key, encodings.parameters.get(key) or encodings.activations[key])
    elif key in encodings.parameters:
        raise SdconvertError(
            f"the exporter left `{key}` no tensor of its own",
            hint="please report this with the versions that `sdconvert doctor` prints",
        )
    else:
        (encoding,), second = encodings.activations[key], key.endswith(SECOND)
        name = f"{marker.outputs[0].consumers()[0].name}_second" if second else str(source.name)
        stem = _stem(graph, name, key)
        grid = _grid(graph, encoding, stem, signed=second)
        if (known := _quantized_as(source, grid)) is not None:
            marker.outputs[0].replace_all_uses_with(known)
        else:
            pair = _pair(source, grid, stem)
            pair[-1].metadata_props[TENSOR_KEY] = key
            _insert(graph, marker, marker.outputs[0], pair)
    graph.remove(marker, safe=True)


def _grid(graph: ir.Graph, encoding: Encoding, stem: str, *, signed: bool) -> list[ir.Value]:
    """Scale and zero point of an activation; a symmetric one may be stored with its sign."""
    signed = signed and encoding["is_symmetric"] == "True"
    scale, zero_point = torch.tensor(encoding["scale"]), torch.tensor(0 if signed else -encoding["offset"])
    return [
        _constant(graph, f"{stem}_scale", scale, ir.DataType.FLOAT),
        _constant(graph, f"{stem}_zero_point", zero_point, _integers(encoding["bitwidth"], signed)),
    ]


def _quantized_as(value: ir.Value, grid: list[ir.Value]) -> ir.Value | None:
    """What a value's own pair makes, or one behind it, if it has the same grid.

    The exporter drops a concatenation of one, and computes once what the model computes several times.
    """
    if (maker := value.producer()) is not None and _has_grid(maker, "DequantizeLinear", grid):
        return value
    found = (reader for reader in value.consumers() if _has_grid(reader, "QuantizeLinear", grid))
    return next((quantize.outputs[0].consumers()[0].outputs[0] for quantize in found), None)


def _has_grid(node: ir.Node, op_type: str, grid: list[ir.Value]) -> bool:
    if node.op_type != op_type:
        return False
    pairs = [(old.const_value, new.const_value) for old, new in zip(node.inputs[1:], grid, strict=True) if old]
    return all(
        old and new and old.dtype == new.dtype and np.array_equal(old.numpy(), new.numpy()) for old, new in pairs
    )


def _pass_grid_on(graph: ir.Graph, node: ir.Node) -> None:
    """Give what a node makes by moving quantized values a pair with their grid, if it is one for all of them."""
    assert node.inputs[0] is not None  # each of these ops has data
    dequantize = node.inputs[0].producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or "axis" in dequantize.attributes:
        return
    for made in node.outputs:
        _insert(graph, node, made, _pair(made, dequantize.inputs[1:], str(made.name)))


def _pair(source: ir.Value, grid: Sequence[ir.Value | None], stem: str) -> list[ir.Node]:
    quantize = ir.node("QuantizeLinear", [source, *grid], name=f"{stem}_q")
    quantize.outputs[0].name = f"{stem}_q"
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *grid], name=f"{stem}_dq")
    dequantize.outputs[0].name = f"{stem}_qdq"
    return [quantize, dequantize]


def _store(graph: ir.Graph, marker: ir.Node, key: str, entries: list[Encoding]) -> None:
    """Put a weight's, or another constant's, integers in a marker's place, transposed where they are read so."""
    source = marker.inputs[0]
    assert source is not None  # a marker has one input
    assert source.const_value is not None  # and an initializer a value
    weight = torch.from_numpy(source.const_value.numpy())
    name = _stem(graph, str(source.name), key)
    grid = WeightGrid.from_encodings(entries, weight.shape)
    codes, scale, zero_point, attributes = grid.codes(weight), grid.scale, grid.zero_point, {"axis": 0}
    if len(scale) == 1:
        scale, zero_point, attributes = scale[0], zero_point[0], {}
    elif len(scale) > len(weight):
        blocks = len(scale) // len(weight)
        shape, ones = (len(weight), blocks, *weight.shape[2:]), [1] * (weight.dim() - 2)
        scale, zero_point = (values.reshape(*shape[:2], *ones).expand(shape) for values in (scale, zero_point))
        attributes = {"axis": 1, "block_size": weight.shape[1] // blocks}
    made = marker.outputs[0]
    if [reader.op_type for reader in made.consumers()] == ["Transpose"]:
        (transpose,) = made.consumers()
        axes = list(transpose.attributes["perm"].as_ints())
        codes, made = codes.permute(axes), transpose.outputs[0]
        scale, zero_point = (values.permute(axes) if values.dim() > 1 else values for values in (scale, zero_point))
        attributes = {k: axes.index(v) if k == "axis" else v for k, v in attributes.items()}
    kind = _integers(entries[0]["bitwidth"], signed=grid.bounds[0] < 0)
    inputs = [
        _constant(graph, f"{name}_q", codes, kind),
        _constant(graph, f"{name}_scale", scale, ir.DataType.FLOAT),
        _constant(graph, f"{name}_zero_point", zero_point, kind),
    ]
    node = ir.node("DequantizeLinear", inputs, attributes, name=f"{name}_dq")
    node.outputs[0].name = f"{name}_qdq"
    _insert(graph, marker, made, [node])
    if (transposed := made.producer()) not in (None, marker):
        graph.remove(transposed, safe=True)


def _insert(graph: ir.Graph, after: ir.Node, value: ir.Value, nodes: list[ir.Node]) -> None:
    """Have whoever reads a value read what the last of some new nodes makes; the graph's outputs keep their names."""
    new, source = nodes[-1].outputs[0], nodes[0].inputs[0]
    new.shape, new.type = value.shape, value.type
    if value.is_graph_output():
        new.name, value.name = value.name, f"{value.name}_float"
    value.replace_all_uses_with(new, replace_graph_outputs=True)
    nodes[0].replace_input_with(0, source)
    graph.insert_after(after, nodes)


def _stem(graph: ir.Graph, name: str, key: str) -> str:
    """What names begin with: the tensor's, unless another quantizer of the same tensor has them."""
    return key if f"{name}_scale" in graph.initializers else name


def _constant(graph: ir.Graph, name: str, value: Tensor, kind: ir.DataType) -> ir.Value:
    constant = ir.val(name, const_value=ir.tensor(value.numpy().astype(kind.numpy()), dtype=kind, name=name))
    graph.register_initializer(constant)
    return constant


def _integers(bits: int, signed: bool) -> ir.DataType:
    return ir.DataType[f"{'' if signed else 'U'}INT{bits}"]
