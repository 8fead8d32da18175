"""What a recipe asks of a family is compared with what the family can do, all of it, before any work."""

import pytest

from sdconvert.adapters import AdapterCapabilities, AdapterRegistry, require_capabilities
from sdconvert.errors import CapabilityError

ALL = AdapterCapabilities(quantize=True, mha2sha=True, adaround=True, cfg_split=True, block_parallel=True)
NONE = AdapterCapabilities()
EVERYTHING = {"quantize": True, "mha2sha": True, "adaround": True, "cfg_degree": 2, "pipeline_parallel_degree": 4}


def test_x8_what_a_family_can_do_may_be_asked() -> None:
    assert list(ALL.violations(EVERYTHING)) == []
    assert list(NONE.violations(dict.fromkeys(("quantize", "mha2sha", "adaround"), False))) == []
    assert list(NONE.violations({"cfg_degree": 1, "pipeline_parallel_degree": 1})) == []


@pytest.mark.parametrize("name", ["quantize", "mha2sha", "adaround"])
def test_x8_a_truth_value_against_a_family_without_it_is_refused(name: str) -> None:
    assert list(NONE.violations({name: True})) == [f"{name} is asked for and not supported"]


def test_x8_degrees_are_refused() -> None:
    assert list(NONE.violations({"cfg_degree": 2})) == ["cfg_degree 2 is asked for, and it has no cfg_split"]
    assert list(ALL.violations({"cfg_degree": 3})) == ["cfg_degree 3 is asked for, and at most 2 is possible"]
    assert list(ALL.violations({"pipeline_parallel_degree": 9}, blocks=8)) == [
        "pipeline_parallel_degree 9 is asked for, and at most 8 is possible"
    ]


@pytest.mark.parametrize("request_", [{"mha2sha": 2}, {"cfg_degree": True}, {"sequence_parallel_degree": 2}])
def test_x8_a_request_that_is_none_is_refused(request_: dict[str, int]) -> None:
    with pytest.raises(CapabilityError, match="asks for no capability") as error:
        list(ALL.violations(request_))
    assert "mha2sha (true or false)" in error.value.hint


def test_x8_all_violations_of_all_graphs_are_in_one_message() -> None:
    families = {"unet": ("UNet2DConditionModel", ALL), "text_encoder": ("CLIPTextModel", NONE)}
    with pytest.raises(CapabilityError, match="6 requests cannot be met") as error:
        require_capabilities(families, {"unet": EVERYTHING | {"cfg_degree": 3}, "text_encoder": EVERYTHING})
    lines = error.value.args[0].splitlines()[1:]
    assert lines[0].startswith("unet (UNet2DConditionModel): cfg_degree 3")
    assert [line.split(":")[0] for line in lines[1:]] == ["text_encoder (CLIPTextModel)"] * 5
    require_capabilities(families, {"unet": EVERYTHING})


def test_capabilities_of_the_families() -> None:
    able = {origin.__name__: adapter.capabilities for origin, adapter in AdapterRegistry.entries().items()}
    assert all(one.quantize and one.mha2sha for one in able.values())
