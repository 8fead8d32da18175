"""The simulation: ranges taken, stored, loaded and refused; and what the quantized graph computes."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from static_graphs import module_case, shared_case, shared_simulation, shared_trace, simulate
from torch import Tensor, nn

from sdconvert.errors import EncodingsError, PreconditionError, UsageError
from sdconvert.metrics import worst_sqnr_db
from sdconvert.quantize import graph
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Encodings, Simulation

GRAPHS = ["small_controlnet", "unet"]


@pytest.fixture
def toy() -> Simulation:
    torch.manual_seed(0)
    return simulate(module_case(nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 4)), 1, 6, 8))


@pytest.mark.parametrize("name", GRAPHS)
def test_quantization_costs_little(name: str) -> None:
    case, simulation = shared_case(name), shared_simulation(name)
    for inputs in case.samples:
        assert worst_sqnr_db(case.adapter.run(inputs), simulation(inputs)) > 28


@pytest.mark.parametrize("name", GRAPHS)
def test_a_second_simulation_with_the_same_ranges_is_bit_equal(name: str) -> None:
    case, first = shared_case(name), shared_simulation(name)
    second = Simulation(case.adapter, case.samples[0], first.settings)
    second.load(first.encodings())
    assert second.encodings() == first.encodings()
    for inputs in case.samples:
        answers = first(inputs), second(inputs)
        assert answers[0].keys() == answers[1].keys()
        assert all(torch.equal(answers[0][key], answers[1][key]) for key in answers[0])


def test_outputs_are_plain_tensors_under_the_adapter_s_names() -> None:
    simulation = shared_simulation("unet")
    (output,) = simulation(shared_case("unet").samples[0]).values()
    assert type(output) is Tensor
    assert simulation.output_names == ("out_sample",)


def test_inputs_are_taken_by_name_not_by_order() -> None:
    inputs = shared_case("unet").samples[0]
    reordered = dict(reversed(inputs.items()))
    answers = [shared_simulation("unet")(one)["out_sample"] for one in (inputs, reordered)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("name", GRAPHS)
def test_everything_that_is_stored_has_a_quantizer(name: str) -> None:
    simulation = shared_simulation(name)
    encodings, traced = simulation.encodings(), shared_trace(name)
    expected = {value.key for value in graph.values(traced)} | {operand.key for operand in graph.operands(traced)}
    assert encodings.activations.keys() == expected
    parameters = {name for name, _ in shared_case(name).adapter.model.named_parameters()}
    unused = {name for name in parameters if ".to_rgbs." in name}
    assert encodings.parameters.keys() == {key for key in parameters - unused if not key.endswith(".bias")}
    for node in simulation.graph_module.graph.nodes:
        if node.target in graph.VALUE_OPS:
            assert [user.op for user in node.users] == ["call_module"], node


@pytest.mark.parametrize(
    ("name", "arch", "bitwidth", "symmetric"), [("unet", 75, 16, "True"), ("small_controlnet", 69, 8, "False")]
)
def test_grids_are_those_of_the_settings(name: str, arch: int, bitwidth: int, symmetric: str) -> None:
    encodings = shared_simulation(name, arch).encodings()
    state = shared_case(name).adapter.model.state_dict()
    for key, entries in encodings.parameters.items():
        norm = ".norm" in key or key.startswith("conv_norm_out")
        assert len(entries) == (1 if norm else state[key].shape[0]), key
        assert {e["bitwidth"] for e in entries} == {16 if norm else 8}
        assert {e["is_symmetric"] for e in entries} == {"False" if norm else "True"}
    for key, (entry,) in encodings.activations.items():
        second = key.endswith(".second")
        assert entry["bitwidth"] == (bitwidth if second else 16)
        assert entry["is_symmetric"] == (symmetric if second else "False")


def test_softmax_has_a_grid_on_which_the_htp_rounds() -> None:
    """tests/qnn/test_ops_on_htp.py shows why; at 8 bits half of the codes would be too many to lose."""
    found = {key: e for key, (e,) in shared_simulation("unet").encodings().activations.items() if ":softmax." in key}
    assert len(found) == len(shared_case("unet").adapter.attention_layers())
    for entry in found.values():
        assert (entry["min"], entry["scale"], entry["offset"]) == (-1, 2**-15, -(2**15))
    coarse = load_settings({75}).with_bitwidths(weight=8, activation=8, per_channel=True)
    assert coarse.fixed_ranges["softmax"] == (0, 1)


def test_ranges_are_what_calibration_saw_and_the_margin(toy: Simulation) -> None:
    case = module_case(toy.adapter.model, 1, 6, 8)
    (entry,) = toy.encodings().activations[":x"]
    seen = torch.cat([sample["x"] for sample in case.samples])
    step, wider = entry["scale"], 1 + toy.settings.range_margin
    assert entry["min"] - step <= wider * float(seen.min()) <= entry["min"] + step
    assert entry["max"] - step <= wider * float(seen.max()) <= entry["max"] + step


def test_an_uncalibrated_simulation_does_not_run() -> None:
    case = module_case(nn.Linear(2, 2), 1, 2)
    simulation = Simulation(case.adapter, case.samples[0], load_settings({75}))
    with pytest.raises(PreconditionError, match="the simulation of module has no ranges"):
        simulation(case.samples[0])
    with pytest.raises(PreconditionError, match="no ranges"):
        simulation.layer_sqnr_db(case.samples[0])
    with pytest.raises(PreconditionError, match="no ranges"):
        simulation.encodings()


def test_calibration_without_samples_is_an_error(toy: Simulation) -> None:
    with pytest.raises(PreconditionError, match="no calibration samples for module"):
        toy.calibrate([])


def test_a_range_of_the_adapter_holds_whatever_the_data_show() -> None:
    case = module_case(nn.SiLU(), 1, 6, 8)
    case.adapter.input_ranges = {"x": (-50.0, 0.0)}  # type: ignore[misc]
    (entry,) = simulate(case).encodings().activations[":x"]
    assert (entry["min"], entry["max"]) == (pytest.approx(-50, rel=1e-3), 0)
    case.adapter.input_ranges = {"mask": (-50.0, 0.0)}  # type: ignore[misc]
    with pytest.raises(UsageError, match="ModuleAdapter.input_ranges has `mask`, no float input of module"):
        simulate(case)


def test_calibrating_again_takes_the_new_ranges(toy: Simulation) -> None:
    before = toy.encodings()
    wider = [{"x": 4 * sample["x"]} for sample in module_case(toy.adapter.model, 1, 6, 8).samples]
    toy.calibrate(wider)
    after = toy.encodings()
    assert after.parameters == before.parameters
    assert math.isclose(after.activations[":x"][0]["scale"], 4 * before.activations[":x"][0]["scale"], rel_tol=1e-3)


def changed(encodings: Encodings, section: str, **entries: Any) -> Encodings:
    content = copy.deepcopy(getattr(encodings, section)) | entries
    return replace(encodings, **{section: {key: value for key, value in content.items() if value is not None}})


@pytest.mark.parametrize(
    ("section", "entries", "message"),
    [
        ("parameters", {"0.weight": None}, "the parameter encodings do not fit the graph: 1 missing: 0.weight"),
        ("parameters", {"9.weight": [{}]}, "1 unexpected: 9.weight"),
        ("activations", {"1:silu.0": None}, "the activation encodings do not fit the graph: 1 missing: 1:silu.0"),
        ("activations", {":y": [{}], ":x": None}, "1 missing: :x; 1 unexpected: :y"),
        ("activations", {":x": [{}, {}]}, "`:x` has 2 encodings, its quantizer takes 1"),
        ("activations", {":x": [{"dtype": "float", "bitwidth": 16}]}, "`:x` is quantized as float, not int"),
    ],
)
def test_ranges_that_do_not_fit_are_named(toy: Simulation, section: str, entries: dict[str, Any], message: str) -> None:
    with pytest.raises(EncodingsError, match=message):
        toy.load(changed(toy.encodings(), section, **entries))


def test_a_list_that_is_too_short_is_named(toy: Simulation) -> None:
    encodings = toy.encodings()
    short = changed(encodings, "parameters", **{"2.weight": encodings.parameters["2.weight"][:3]})
    with pytest.raises(EncodingsError, match=r"`2\.weight` has 3 encodings, its quantizer takes 4"):
        toy.load(short)


@pytest.mark.parametrize(("section", "key"), [("parameters", "2.weight"), ("activations", "2:linear.0")])
def test_a_refused_load_changes_nothing(toy: Simulation, section: str, key: str) -> None:
    before = toy.encodings()
    wider = copy.deepcopy(before)
    for entry in (e for entries in wider.parameters.values() for e in entries):
        entry.update({name: 2 * entry[name] for name in ("min", "max", "scale")})
    with pytest.raises(EncodingsError):
        toy.load(changed(wider, section, **{key: [{}, {}]}))
    assert toy.encodings() == before


@pytest.mark.parametrize("name", GRAPHS)
def test_layer_figures_cover_every_stored_tensor(name: str) -> None:
    simulation = shared_simulation(name)
    figures = simulation.layer_sqnr_db(shared_case(name).samples[0])
    assert figures.keys() == simulation.encodings().activations.keys()
    assert min(figures.values()) > 15
    assert figures[":sample"] > 80


def test_layer_figures_fall_at_the_layer_that_has_4_bits() -> None:
    """Of layers side by side, the one with 4-bit weights is by far the worst, and its input is untouched."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([F.silu(branch(x)) for branch in self.branches], dim=-1)

    torch.manual_seed(0)
    case = module_case(Branches(), 1, 16, 32)
    simulation = simulate(case)
    before = simulation.layer_sqnr_db(case.samples[0])
    key = "branches.2.weight"
    coarse = [
        entry | {"bitwidth": 4, "offset": -8, "scale": bound / 7, "min": -bound * 8 / 7, "max": bound}
        for entry in simulation.encodings().parameters[key]
        for bound in [entry["max"]]
    ]
    simulation.load(changed(simulation.encodings(), "parameters", **{key: coarse}))
    after = simulation.layer_sqnr_db(case.samples[0])
    linear = {key: figure for key, figure in after.items() if ":linear." in key}
    assert min(linear, key=linear.__getitem__) == "branches.2:linear.0"
    assert before["branches.2:linear.0"] > 38 > 25 > after["branches.2:linear.0"]
    same = set(after) - {"branches.2:linear.0", ":silu.2", ":cat.0"}
    assert {key: after[key] for key in same} == {key: before[key] for key in same}


def test_another_module_may_stand_for_every_quantizer() -> None:
    case, simulation = shared_case("small_controlnet"), shared_simulation("small_controlnet", 69)
    before = simulation(case.samples[0])
    keys: list[str] = []

    def nothing(key: str) -> nn.Module:
        keys.append(key)
        return nn.Identity()

    floating = simulation.with_quantizers_as(nothing)
    answers = floating(*(case.samples[0][name] for name in simulation.input_names))
    torch.testing.assert_close(list(answers), list(case.adapter.run(case.samples[0]).values()), rtol=0, atol=1e-4)
    assert sorted(keys) == sorted([*simulation.quantizers.activations, *simulation.quantizers.parameters])
    assert all(torch.equal(tensor, before[name]) for name, tensor in simulation(case.samples[0]).items())


def test_the_model_keeps_its_weights() -> None:
    case = module_case(nn.Sequential(nn.Linear(8, 8), nn.SiLU()), 1, 6, 8)
    before = {name: tensor.clone() for name, tensor in case.adapter.model.state_dict().items()}
    simulate(case)
    after = case.adapter.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
