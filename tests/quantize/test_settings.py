"""Quantizer settings: which grid each generation of the NPU gets, and what a recipe may change of it."""

from typing import Any

import pytest

from sdconvert.config import RangeEstimator, Recipe
from sdconvert.errors import UsageError
from sdconvert.quantize.settings import Grid, load_settings, quantizer_settings
from sdconvert.soc import find_soc, soc_table

_INT16 = Grid(bitwidth=16, symmetric=True)
_UINT8 = Grid(bitwidth=8, symmetric=False)


def recipe(socs: list[str], **quantize: Any) -> Recipe:
    return Recipe.model_validate({"qnn": {"socs": tuple(socs)}, "quantize": quantize})


@pytest.mark.parametrize(
    ("soc", "operand"),
    [("SM8350", _UINT8), ("SM8450", _UINT8), ("SM8550", _INT16), ("SM8650", _INT16), ("SM8750", _INT16)],
)
def test_second_operand_of_matmul_depends_on_the_generation(soc: str, operand: Grid) -> None:
    assert quantizer_settings(recipe([soc])).matmul_second_operand == operand


def test_every_soc_has_settings() -> None:
    for soc in soc_table().values():
        if soc.arch >= 68:
            assert soc.arch in load_settings({soc.arch}).architectures


def test_socs_of_one_group_share_settings() -> None:
    assert quantizer_settings(recipe(["SM8550", "SM8650", "SM8750"])).name == "htp_v73"


def test_socs_of_two_groups_are_refused() -> None:
    assert (find_soc("SM8450").arch, find_soc("SM8650").arch) == (69, 75)
    with pytest.raises(UsageError, match="no quantizer settings cover v69, v75 together") as error:
        quantizer_settings(recipe(["SM8450", "SM8650"]))
    assert "one group per run" in error.value.hint


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(UsageError, match="no quantizer settings cover v66 together"):
        load_settings({66})


def test_recipe_sets_the_bit_widths_and_nothing_else() -> None:
    plain = load_settings({75})
    changed = quantizer_settings(recipe(["SM8650"], weight_bitwidth=4, activation_bitwidth=8, per_channel=False))
    assert changed.activations == Grid(bitwidth=8, symmetric=False)
    for op in ("conv2d", "linear"):
        assert plain.parameters[op] == Grid(bitwidth=8, symmetric=True, per_channel=True)
        assert changed.parameters[op] == Grid(bitwidth=4, symmetric=True, per_channel=False)
    for op in ("add", "embedding"):
        assert plain.parameters[op] == plain.activations
        assert changed.parameters[op] == changed.activations
    rest = {"activations", "parameters", "estimators"}
    assert changed.estimators == {"default": RangeEstimator()}
    assert changed.model_dump(exclude=rest) == plain.model_dump(exclude=rest)
    for op in ("group_norm", "layer_norm"):
        assert changed.parameters[op] == plain.parameters[op] == Grid(bitwidth=16, symmetric=False)
