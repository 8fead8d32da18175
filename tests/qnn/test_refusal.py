"""What the compiler refuses is said in the words of the torch model."""

import re
from pathlib import Path

import onnx
import pytest
import torch
from static_graphs import module_case, simulate
from torch import nn

from sdconvert.errors import CompileError
from sdconvert.export.onnx_graph import to_onnx
from sdconvert.export.origin import origins
from sdconvert.qnn.context import compile_context
from sdconvert.quantize.graph import VALUE_OPS
from sdconvert.soc import find_soc


class Block(nn.Module):
    """A convolution, an activation that the HTP lacks, a norm, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj_in, self.act, self.norm = nn.Conv2d(4, 8, 1), nn.SELU(), nn.GroupNorm(2, 8)
        self.proj_out = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj_out(self.norm(self.act(self.proj_in(x))))


class Model(nn.Module):
    """Two such blocks, six axes between them, and the activation as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = Block(), nn.ModuleDict({"second": Block()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        turned = x.reshape(1, 4, 4, 2, 4, 2).permute(0, 1, 3, 2, 5, 4).reshape(x.shape)
        return nn.functional.selu(self.rest["second"](turned))


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Norms as they are, which chips without floating point refuse, and an activation that they do not have either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VALUE_OPS, torch.ops.aten.selu.default, "selu")
        case = module_case(Model(), 1, 4, 8, 8)
        model = to_onnx(simulate(case, 68), case.samples[0], opset=21)
    path = tmp_path_factory.mktemp("refused") / "graph.onnx"
    onnx.save(model, str(path))
    return path


def test_what_the_compiler_refuses_is_named_with_its_layer(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(CompileError) as caught:
        compile_context(graph, tmp_path, find_soc("QCS6490"))
    message, _, _ = str(caught.value).partition("\nhint")
    said = dict(re.findall(r"(\w+ `\w+`) (of [^,)]*)", message))
    assert [(one.partition(" ")[0], place) for one, place in said.items()] == [
        ("Selu", "of layer `first.act`"),
        ("Selu", "of layer `rest.second.act`"),
        ("Selu", "of the model itself"),
        ("GroupNormalization", "of layer `first.norm`"),
        ("GroupNormalization", "of layer `rest.second.norm`"),
    ]
    # Names as in the file, not as the compiler's own passes write them.
    assert {one.split("`")[1] for one in said} <= {node.name for node in onnx.load(graph).graph.node}
    assert "compute the Selu of layer `first.act` with ops that HTP takes" in caught.value.hint


def test_what_only_moves_values_lies_between_layers(graph: Path) -> None:
    nodes = [node.name for node in onnx.load(graph).graph.node if node.op_type in ("Reshape", "Transpose")]
    places = {str(origin) for origin in origins(graph, nodes).values()}
    assert places == {"between layers `first.proj_out` and `rest.second.proj_in`"}
    assert len(nodes) == 3


def test_a_node_that_no_tensor_is_near_to_has_no_layer(tmp_path: Path) -> None:
    graph = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> graph (float[1] x) => (float[1] y) { y = Abs(x) }'
    )
    graph.graph.node[0].name = "abs"
    onnx.save(graph, str(tmp_path / "graph.onnx"))
    assert origins(tmp_path / "graph.onnx", ["abs", "none such"]) == {}
