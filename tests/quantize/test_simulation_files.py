"""A simulation's ranges as files: nothing is lost on the way there and back, and what does not fit is named."""

import copy
from pathlib import Path
from typing import Any

import pytest
from static_graphs import module_case, shared_case, shared_simulation, simulate
from torch import nn

from sdconvert.errors import EncodingsError
from sdconvert.io.encodings import read_encodings, write_encodings
from sdconvert.quantize.artifact import load_simulation
from sdconvert.quantize.files import from_sections, to_sections


@pytest.fixture(scope="module", params=["small_controlnet", pytest.param("unet", marks=pytest.mark.slow)])
def graph(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_sections_hold_all_ranges(graph: str) -> None:
    simulation = shared_simulation(graph)
    assert from_sections(to_sections(simulation), simulation) == simulation.encodings()


def test_a_file_makes_the_same_simulation(tmp_path: Path) -> None:
    case, simulation = shared_case("small_controlnet"), shared_simulation("small_controlnet")
    write_encodings(tmp_path / "graph.encodings", to_sections(simulation))
    loaded = load_simulation(tmp_path / "graph.encodings", case.adapter, case.samples[0], simulation.settings)
    assert loaded.encodings() == simulation.encodings()


def test_activations_are_those_that_a_leaf_module_makes_once(graph: str) -> None:
    """AIMET knows these; all others it would give to another tensor, or refuse."""
    sections = to_sections(shared_simulation(graph))
    modules = dict(shared_case(graph).adapter.model.named_modules())
    for path, places in sections["activation_encodings"].items():
        assert not list(modules[path].children())
        assert places.keys() == {"output"}
    activations, functional = set(sections["activation_encodings"]), sections["functional_encodings"]
    assert not activations & set(functional)
    assert set(functional[""]) >= set(shared_case(graph).samples[0])
    # Called three times per ResnetBlock2D: no one output of it.
    assert "silu.2" in functional["mid_block.resnets.0.nonlinearity"]
    assert {path for path in modules if path.endswith((".to_q", ".to_v", ".conv1", ".norm2"))} <= activations


def test_both_sections_together_hold_every_tensor_once(graph: str) -> None:
    sections = to_sections(shared_simulation(graph))
    count = len(sections["activation_encodings"]) + sum(map(len, sections["functional_encodings"].values()))
    assert count == len(shared_simulation(graph).encodings().activations)


def broken(section: str, path: str, value: Any) -> dict[str, Any]:
    sections: dict[str, Any] = copy.deepcopy(to_sections(shared_simulation("small_controlnet")))
    sections[section][path] = value
    return sections


ENTRY = {"bitwidth": 16, "dtype": "int", "is_symmetric": "False", "max": 1.0, "min": 0.0, "offset": 0, "scale": 1e-5}


@pytest.mark.parametrize(
    "path",
    ["conv_inn", "mid_block", "mid_block.resnets.0.nonlinearity", "down_blocks.0.resnets.0.dropout"],
)
def test_an_activation_that_the_graph_does_not_make_is_named(path: str) -> None:
    sections = broken("activation_encodings", path, {"output": {"0": ENTRY}})
    with pytest.raises(
        EncodingsError, match=f"activation encodings name `{path}`, which makes no tensor of the controlnet"
    ):
        from_sections(sections, shared_simulation("small_controlnet"))


@pytest.mark.parametrize("places", [{"input": {"0": ENTRY}}, {"output": {"1": ENTRY}}, [ENTRY]])
def test_an_activation_without_an_output_range_is_named(places: Any) -> None:
    with pytest.raises(EncodingsError, match="`conv_in` has no range for its output"):
        from_sections(broken("activation_encodings", "conv_in", places), shared_simulation("small_controlnet"))


def test_a_functional_tensor_that_the_graph_does_not_make_is_named() -> None:
    simulation = shared_simulation("small_controlnet")
    sections = broken("functional_encodings", "mid_block.resnets.0", {"add.7": ENTRY})
    with pytest.raises(EncodingsError, match=r"unexpected: mid_block\.resnets\.0:add\.7"):
        simulation.load(from_sections(sections, simulation))


def test_ranges_of_another_graph_are_refused(tmp_path: Path) -> None:
    write_encodings(tmp_path / "x.encodings", to_sections(shared_simulation("small_controlnet")))
    with pytest.raises(EncodingsError, match="controlnet_cond_embedding"):
        from_sections(read_encodings(tmp_path / "x.encodings"), simulate(module_case(nn.Linear(2, 2), 1, 2)))
