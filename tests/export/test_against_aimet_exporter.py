"""The ONNX file against that of AIMET's own exporter: the same ops, integers, grids and answers."""

import contextlib
import io
from collections import Counter
from pathlib import Path

import aimet_torch.onnx
import onnx
import pytest
import torch
from diffusers.models.attention_processor import Attention
from onnx import ModelProto, numpy_helper
from static_graphs import Case, module_case
from torch import nn

from sdconvert.export.onnx_graph import to_onnx
from sdconvert.export.runner import OnnxRunner
from sdconvert.quantize import aimet, graph
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Simulation


def aimet_s(simulation: Simulation, case: Case, path: Path) -> ModelProto:
    """What AIMET makes of a simulation, without the quantizers of second operands: it writes one pair per tensor."""
    seconds = {key: one for key, one in simulation.quantizers.activations.items() if key.endswith(graph.SECOND)}
    module = aimet.with_quantizers_as(simulation.graph_module, seconds, lambda _: nn.Identity())
    inputs = tuple(case.samples[0][name] for name in simulation.input_names)
    with contextlib.redirect_stdout(io.StringIO()):
        aimet_torch.onnx.export(
            module,
            inputs,
            str(path),
            dynamo=True,
            opset_version=21,
            prequantize_constants=True,
            input_names=list(simulation.input_names),
            output_names=list(simulation.output_names),
        )
    return onnx.load(path)


def without_seconds(model: ModelProto) -> ModelProto:
    """A copy without the pairs of second operands."""
    bare = ModelProto()
    bare.CopyFrom(model)
    pairs = {node.output[0]: node.input[0] for node in bare.graph.node if "_second_" in node.name}
    kept = [node for node in bare.graph.node if "_second_" not in node.name]
    for node in kept:
        for index in range(len(node.input)):
            while node.input[index] in pairs:
                node.input[index] = pairs[node.input[index]]
    del bare.graph.node[:]
    bare.graph.node.extend(kept)
    grids = [tensor for tensor in bare.graph.initializer if "_second_" not in tensor.name]
    del bare.graph.initializer[:]
    bare.graph.initializer.extend(grids)
    return bare


def described(model: ModelProto) -> tuple[Counter[str], Counter[tuple[int, tuple[int, ...], bytes]]]:
    """Nodes by type; what Q/DQ nodes and layers take from the file, by type, shape and content."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    read = [name for node in model.graph.node for name in node.input if name in tensors]
    contents = (
        (tensors[name].data_type, tuple(tensors[name].dims), numpy_helper.to_array(tensors[name]).tobytes())
        for name in read
    )
    return Counter(node.op_type for node in model.graph.node), Counter(contents)


@pytest.mark.parametrize(
    ("bits", "per_channel", "kind"), [(8, True, "image"), (4, True, "tokens"), (8, False, "tokens")]
)
def test_both_files_say_the_same(bits: int, per_channel: bool, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if kind == "image":
        norm, linear = nn.GroupNorm(2, 8), nn.Linear(16, 16)
        case = module_case(nn.Sequential(nn.Conv2d(4, 8, 3), norm, nn.SiLU(), nn.Flatten(2), linear), 1, 4, 6, 6)
    else:
        case = module_case(Attention(query_dim=16, heads=2, dim_head=8, bias=True), 1, 6, 16)
    settings = load_settings({75}).with_bitwidths(weight=bits, activation=16, per_channel=per_channel)
    simulation = Simulation(case.adapter, case.samples[0], settings)
    simulation.calibrate(case.samples)
    ours = without_seconds(to_onnx(simulation, case.samples[0], opset=21))
    theirs = aimet_s(simulation, case, tmp_path / "aimet.onnx")
    assert described(ours) == described(theirs)
    onnx.save(ours, str(tmp_path / "ours.onnx"))
    answers = [OnnxRunner(tmp_path / f"{name}.onnx")(case.samples[0])["y"] for name in ("ours", "aimet")]
    assert torch.equal(*answers)
