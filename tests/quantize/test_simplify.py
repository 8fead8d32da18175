"""Simplifying a traced graph changes its ops, not its values."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from static_graphs import module_case
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from sdconvert.errors import UnsupportedModelError
from sdconvert.quantize import graph

aten = torch.ops.aten
PERMUTE, RESHAPE = "aten.permute.default", "aten.reshape.default"


class Function(nn.Module):
    """A function of one tensor as a module; `weight` is a table of eight rows."""

    def __init__(self, function: Callable[[Tensor, nn.Embedding], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(8, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.table)


def trace(function: Callable[[Tensor, nn.Embedding], Tensor], *shape: int) -> GraphModule:
    """The traced graph of a function, after checking that it computes the function."""
    case = module_case(Function(function), *shape)
    graph_module = graph.trace(case.adapter, case.samples[0])
    x = case.samples[0]["x"]
    torch.testing.assert_close(graph_module(x)[0], case.adapter.run({"x": x})["y"], rtol=0, atol=0)
    return graph_module


def functions(graph_module: GraphModule) -> list[Node]:
    return [node for node in graph_module.graph.nodes if node.op == "call_function"]


def ops(graph_module: GraphModule) -> list[str]:
    return [str(node.target) for node in functions(graph_module)]


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_an_einsum_that_only_moves_is_a_permutation_of_at_most_five_axes(data: st.DataObject) -> None:
    after = "".join(data.draw(st.permutations("abcdef"[: data.draw(st.integers(2, 6))])))
    before = "".join(sorted(after))
    sizes = [data.draw(st.integers(1, 3)) for _ in before]
    if len(sizes) == 6:
        sizes[data.draw(st.integers(0, 5))] = 1
    graph_module = trace(lambda x, _: F.silu(torch.einsum(f"{before}->{after}", x)), *sizes)
    assert set(ops(graph_module)) == {"aten.silu.default", PERMUTE} | set(ops(graph_module)) & {RESHAPE}
    (permutation,) = (node for node in functions(graph_module) if str(node.target) == PERMUTE)
    assert len(permutation.args[1]) <= 5  # type: ignore[arg-type]


def test_an_einsum_that_computes_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"aten\.einsum"):
        trace(lambda x, _: torch.einsum("ab,bc->ac", x, x), 3, 3)
    with pytest.raises(UnsupportedModelError, match=r"aten\.einsum"):
        trace(lambda x, _: torch.einsum("aab->ab", x), 3, 3, 2)


def test_what_depends_on_no_input_is_one_constant() -> None:
    graph_module = trace(lambda x, _: x + torch.sin(torch.arange(6) / 7).reshape(2, 3), 2, 3)
    assert ops(graph_module) == ["aten.add.Tensor"]
    assert [value.key for value in graph.values(graph_module)] == [":x", ":constant.0", ":add.0"]
    assert graph.parameters(graph_module) == []


def test_equal_constants_are_one() -> None:
    def forward(x: Tensor, _: nn.Embedding) -> Tensor:
        one, same, other = (torch.full((3,), float(k)).cumsum(0) for k in (1, 1, 2))
        return (x + one) * (x + same) * other

    keys = [value.key for value in graph.values(trace(forward, 2, 3))]
    assert [key for key in keys if "constant" in key] == [":constant.0", ":constant.1"]


def test_random_numbers_are_no_constant() -> None:
    with pytest.raises(UnsupportedModelError, match=r"aten\.rand\.default"):
        trace(lambda x, _: x + 0 * torch.rand(3), 2, 3)


def test_a_layer_with_dropout_that_nobody_listens_to_goes() -> None:
    def forward(x: Tensor, _: nn.Embedding) -> Tensor:
        F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
        return F.silu(x)

    assert ops(trace(forward, 1, 2, 3)) == ["aten.silu.default"]


def test_a_cast_to_another_type_is_not_dropped() -> None:
    with pytest.raises(UnsupportedModelError, match=r"aten\.to\.dtype"):
        trace(lambda x, _: F.silu(x.to(torch.float64)), 2, 3)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (range(8), [RESHAPE]),
        (range(5), ["aten.slice.Tensor", RESHAPE]),
        ([2, 0, 1], ["aten.embedding.default"]),
    ],
)
def test_a_lookup_of_the_first_rows_is_a_slice(rows: list[int], expected: list[str]) -> None:
    ids = torch.tensor([list(rows)])
    graph_module = trace(lambda x, table: x + table(ids), 1, len(rows), 3)
    assert ops(graph_module) == [*expected, "aten.add.Tensor"]
    (parameter,) = graph.parameters(graph_module)
    assert (parameter.name, parameter.op) == ("table.weight", "add" if "reshape" in expected[-1] else "embedding")


def test_a_move_that_keeps_the_shape_goes() -> None:
    assert ops(trace(lambda x, _: F.silu(x.reshape(2, 3).expand(2, 3)[:, 0:3]), 2, 3)) == ["aten.silu.default"]
    assert ops(trace(lambda x, _: F.silu(x.transpose(0, 1)), 3, 3)) == ["aten.transpose.int", "aten.silu.default"]
