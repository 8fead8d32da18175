"""The traced graph: what is in it, what its tensors are called, and that it still computes the model."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from static_graphs import Case, module_case, shared_case, shared_trace, small_case, small_controlnet_case
from torch import Tensor, nn
from torch.fx import GraphModule

from sdconvert.errors import UnsupportedModelError
from sdconvert.quantize import graph
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Simulation


def trace(case: Case) -> GraphModule:
    return graph.trace(case.adapter, case.samples[0])


def targets(graph_module: GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in graph_module.graph.nodes if node.op == "call_function")


def keys(graph_module: GraphModule) -> list[str]:
    found = [value.key for value in graph.values(graph_module)]
    found += [operand.key for operand in graph.operands(graph_module)]
    return found + [parameter.name for parameter in graph.parameters(graph_module)]


@pytest.fixture(scope="module")
def traced_unet() -> GraphModule:
    return shared_trace("unet")


@pytest.mark.parametrize("name", ["small_controlnet", "unet"])
def test_keys_are_unique(name: str) -> None:
    assert max(Counter(keys(shared_trace(name))).values()) == 1


def test_keys_are_the_same_in_the_next_trace() -> None:
    assert keys(shared_trace("small_controlnet")) == keys(trace(small_controlnet_case()))


def test_keys_name_modules_ops_and_inputs(traced_unet: GraphModule) -> None:
    case = small_case()
    modules = dict(case.adapter.model.named_modules())
    values = graph.values(traced_unet)
    assert [value.key for value in values if value.op == "input"] == [f":{name}" for name in case.samples[0]]
    for value in values:
        path, _, position = value.key.partition(":")
        assert path in modules
        assert value.op == "input" or position.rpartition(".")[0] == value.op
    attention = "up_blocks.0.pixel_attentions.0.transformer_blocks.0.attn2"
    found = [value.key.partition(":")[2] for value in values if value.key.startswith(f"{attention}:")]
    assert found == ["mul.0", "matmul.0", "softmax.0", "matmul.1"]


def test_every_parameter_of_the_model_is_in_the_graph_once(traced_unet: GraphModule) -> None:
    found = {parameter.name: parameter for parameter in graph.parameters(traced_unet)}
    assert found.keys() == dict(small_case().adapter.model.named_parameters()).keys()
    assert {name for name, parameter in found.items() if parameter.is_bias} == {n for n in found if n.endswith("bias")}


class Twice(nn.Module):
    """One module, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(F.silu(self.linear(x)))
        return output


def test_a_module_that_is_called_twice_makes_two_keys_and_one_weight() -> None:
    graph_module = trace(module_case(Twice(), 2, 4))
    assert [value.key for value in graph.values(graph_module)] == [
        ":x",
        "linear:linear.0",
        ":silu.0",
        "linear:linear.1",
    ]
    found = [(parameter.name, parameter.is_bias) for parameter in graph.parameters(graph_module)]
    assert found == [("linear.weight", False), ("linear.bias", True)]


@pytest.mark.parametrize("name", ["small_controlnet", "unet"])
def test_graph_computes_what_the_model_computes(name: str) -> None:
    case, graph_module = shared_case(name), shared_trace(name)
    for inputs in case.samples[:2]:
        with torch.no_grad():
            outputs = graph_module(*inputs.values())
        for reference, tensor in zip(case.adapter.run(inputs).values(), outputs, strict=True):
            torch.testing.assert_close(tensor, reference, rtol=0, atol=2e-6 * float(reference.abs().max()))


class Ineffective(nn.Module):
    """Dropout in evaluation, a scale of one, a clone, a cast to the same type, and one op that works."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(x * 1.0) / 1
        return F.silu(y.clone().to(torch.float32).contiguous())


def test_ops_without_effect_are_dropped() -> None:
    graph_module = trace(module_case(Ineffective(), 2, 3))
    assert targets(graph_module) == {"aten.silu.default": 1}
    assert graph.parameters(graph_module) == []
    x = torch.randn(2, 3)
    assert torch.equal(graph_module(x)[0], F.silu(x))


def test_a_scale_that_is_a_tensor_is_no_scale_of_one() -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * F.silu(x)

    assert targets(trace(module_case(Gate(), 2, 3))) == {"aten.silu.default": 1, "aten.mul.Tensor": 1}


def test_unknown_ops_are_all_named_with_their_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Hardswish(), nn.ELU()))
    with pytest.raises(UnsupportedModelError) as error:
        trace(module_case(model, 2, 4))
    message = str(error.value)
    assert message.startswith("2 ops have no quantization rule: aten.elu.default in 1.1, aten.hardswish.default in 1.0")
    assert "quantize/graph.py" in error.value.hint


def test_a_weight_that_no_grid_covers_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain

    case = module_case(nn.Sequential(Scaled()), 2, 4)
    with pytest.raises(UnsupportedModelError, match=r"`0\.gain` enters mul"):
        Simulation(case.adapter, case.samples[0], load_settings({75}))


@pytest.mark.parametrize("tokens", [15, 16, 17])
def test_layer_norm_of_sixteen_rows_is_rewritten_and_computes_the_same(tokens: int) -> None:
    case = module_case(nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 8)), 1, tokens, 24)
    graph_module = trace(case)
    assert (targets(graph_module)["aten.reshape.default"] == 2) == (tokens == 16)
    (norm,) = (node for node in graph_module.graph.nodes if node.target is torch.ops.aten.layer_norm.default)
    assert norm.meta["val"].shape == ((1, 16, 1, 24) if tokens == 16 else (1, tokens, 24))
    assert [value.key for value in graph.values(graph_module)] == [":x", "0:layer_norm.0", "1:linear.0"]
    reference = case.adapter.run(case.samples[0])["y"]
    torch.testing.assert_close(graph_module(*case.samples[0].values())[0], reference, rtol=0, atol=1e-6)


def test_all_layer_norms_of_sixteen_rows_in_a_unet_are_rewritten(traced_unet: GraphModule) -> None:
    norms = [node for node in traced_unet.graph.nodes if node.target is torch.ops.aten.layer_norm.default]
    shapes = Counter(tuple(node.meta["val"].shape) for node in norms)
    assert shapes[1, 16, 1, 16] > 0
    assert not any(shape[:-1] == (1, 16) for shape in shapes)


def test_the_light_variant_is_covered() -> None:
    graph_module = trace(small_case(variant="light"))
    assert any("attn2_plus" in value.key for value in graph.values(graph_module))


def test_second_operands_are_those_of_every_matmul(traced_unet: GraphModule) -> None:
    values: list[Any] = graph.values(traced_unet)
    expected = [f"{value.key}.second" for value in values if value.op == "matmul"]
    assert [operand.key for operand in graph.operands(traced_unet)] == expected
    assert len(expected) == 2 * len(small_case().adapter.attention_layers())
