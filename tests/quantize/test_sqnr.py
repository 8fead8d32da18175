"""The probe between two forms of a model: the figures of a comparison by hand, and nothing left behind or kept."""

import copy
import math
import weakref
from typing import Any

import torch
from static_graphs import module_case, simulate
from torch import Tensor, nn

from sdconvert.metrics import sqnr_db
from sdconvert.quantize.sqnr import Comparison, SQNRProbe, layer_sqnr_db


class Net(nn.Sequential):
    """Three layers that are alike."""

    def __init__(self) -> None:
        super().__init__(*(nn.Linear(6, 6) for _ in range(3)))


def two_forms() -> tuple[Net, Net, Tensor]:
    torch.manual_seed(0)
    fp = Net()
    quant = copy.deepcopy(fp)
    quant[1].weight.data += 0.01 * torch.randn(6, 6)
    return fp, quant, torch.randn(4, 6)


def structure(model: nn.Module) -> list[tuple[str, list[int]]]:
    """Modules and their hooks, of which AIMET's quantizers have some of their own."""
    return [(name, [*module._forward_hooks, *module._forward_pre_hooks]) for name, module in model.named_modules()]


def test_figures_are_those_of_a_comparison_by_hand() -> None:
    fp, quant, x = two_forms()
    figures = layer_sqnr_db(fp, quant, {"first": "0", "second": "1", "third": "2"}, [x])
    expected, reference, value = {}, x, x
    for index, key in enumerate(("first", "second", "third")):
        reference, value = fp[index](reference), quant[index](value)
        expected[key] = sqnr_db(reference, value)
    assert list(figures.items()) == list(expected.items())
    assert figures["first"] == math.inf
    assert 10 < figures["second"] < 60
    assert structure(fp) == structure(quant) == structure(Net())


def test_inputs_of_layers_are_compared_before_hooks() -> None:
    fp, quant, x = two_forms()
    both = Comparison(fp, quant, ["2"])
    group = SQNRProbe.wrap_model("sqnr", both, "pre_hook:fp.2", "pre_hook:quant.2")
    (probe,) = group.plugins
    assert math.isnan(probe.sqnr_db)  # type: ignore[arg-type]
    both(x)
    assert probe.sqnr_db == sqnr_db(fp[1](fp[0](x)), quant[1](quant[0](x)))


def test_a_reference_is_let_go_of_as_soon_as_it_is_compared() -> None:
    fp, quant, x = two_forms()
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    for layer in fp:
        layer.register_forward_hook(lambda module, args, output: made.append(weakref.ref(output)))

    def count(module: nn.Module, args: Any, output: Any) -> None:
        alive.append(sum(reference() is not None for reference in made))

    both = Comparison(fp, quant, ["0", "1", "2"])
    names = ["0", "1", "2"]
    SQNRProbe.wrap_model("sqnr", both, [f"fp.{name}" for name in names], [f"quant.{name}" for name in names])
    for layer in quant:
        layer.register_forward_hook(count)
    with torch.no_grad():
        both(x)
    assert alive == [2, 1, 0]


def test_a_simulation_is_judged_without_a_trace() -> None:
    torch.manual_seed(0)
    case = module_case(nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 4)), 1, 6, 8)
    simulation = simulate(case)
    answer, before = simulation(case.samples[0])["y"], structure(simulation.graph_module)
    figures = simulation.layer_sqnr_db(case.samples[0])
    assert list(figures) == [":x", "0:linear.0", "1:silu.0", "2:linear.0"]
    assert figures["2:linear.0"] == sqnr_db(case.adapter.run(case.samples[0])["y"], answer)
    assert figures == simulation.layer_sqnr_db(case.samples[0])
    assert structure(simulation.graph_module) == before
    assert torch.equal(simulation(case.samples[0])["y"], answer)
