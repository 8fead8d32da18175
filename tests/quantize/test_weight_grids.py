"""Bits per layer: patterns decide, each must have an effect, and files carry what they decided."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from static_graphs import Case, module_case
from torch import nn

from sdconvert.config import LayerPrecision
from sdconvert.errors import EncodingsError, UsageError
from sdconvert.quantize.artifact import load_simulation, save_simulation
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Encodings, Simulation
from sdconvert.quantize.weight_grids import deciding_pattern, require_effect

PATHS = {"unet": ["down_blocks.0.ff.net", "up_blocks.0.ff.net", "conv_in"], "controlnet": ["conv_in", "mid.conv"]}


@pytest.fixture(scope="module")
def case() -> Case:
    """Two convolutions, a norm between them, and two linear layers."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(8, 16, 3),
        nn.GroupNorm(2, 16),
        nn.Conv2d(16, 4, 1),
        nn.Linear(4, 8),
        nn.SiLU(),
        nn.Linear(8, 4),
    ]
    return module_case(nn.Sequential(*layers), 1, 8, 6, 6)


def calibrated(case: Case, layers: Mapping[str, LayerPrecision]) -> Simulation:
    settings = load_settings({75}).model_copy(update={"layers": layers})
    simulation = Simulation(case.adapter, case.samples[0], settings)
    simulation.calibrate(case.samples)
    return simulation


def bits(encodings: Encodings) -> dict[str, tuple[int, int]]:
    """Bits and number of scales of every weight."""
    return {name: (entries[0]["bitwidth"], len(entries)) for name, entries in encodings.parameters.items()}


@pytest.mark.parametrize(
    ("patterns", "graph", "layer", "expected"),
    [
        (["*", "up_blocks.*"], "unet", "up_blocks.0.ff.net", "up_blocks.*"),
        (["up_blocks.*", "*"], "unet", "up_blocks.0.ff.net", "*"),
        (["controlnet:*"], "unet", "conv_in", None),
        (["controlnet:*"], "controlnet", "conv_in", "controlnet:*"),
        (["conv"], "unet", "conv_in", None),
        (["unet:*.ff.*"], "unet", "down_blocks.0.ff.net", "unet:*.ff.*"),
    ],
)
def test_the_last_pattern_that_fits_decides(patterns: list[str], graph: str, layer: str, expected: str | None) -> None:
    assert deciding_pattern(patterns, graph, layer) == expected


@pytest.mark.parametrize(
    ("patterns", "message", "hint"),
    [
        (
            ["up_block.*.ff.*"],
            "`up_block.*.ff.*` fits no convolution or linear layer of unet, controlnet",
            "up_blocks.0",
        ),
        (["vae:conv_in"], "`vae:conv_in` fits no convolution", "nearest: `unet:conv_in`"),
        (["controlnet:up_blocks.*"], "`controlnet:up_blocks.*` fits no convolution", "stands for any part"),
        (["unet:conv_in", "conv_*"], "`unet:conv_in` has no effect: later patterns decide on all 1 layers", "general"),
    ],
)
def test_a_pattern_without_effect_is_an_error(patterns: list[str], message: str, hint: str) -> None:
    layers = dict.fromkeys(patterns, LayerPrecision(weight_bitwidth=4))
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        require_effect(layers, PATHS)
    assert hint in error.value.hint


def test_patterns_with_an_effect_pass() -> None:
    layers = dict.fromkeys(["*", "unet:*.ff.*", "conv_in"], LayerPrecision(weight_bitwidth=4))
    require_effect(layers, PATHS)
    require_effect({}, PATHS)


def test_each_weight_gets_its_own_bits_and_norms_keep_theirs(case: Case) -> None:
    layers = {
        "*": LayerPrecision(weight_bitwidth=4),
        "module:2": LayerPrecision(weight_bitwidth=4, block_size=8),
        "5": LayerPrecision(weight_bitwidth=16),
    }
    simulation = calibrated(case, layers)
    require_effect(layers, {"module": simulation.quantizers.layers})
    found = bits(simulation.encodings())
    assert found == {
        "0.weight": (4, 16),
        "1.weight": (16, 1),
        "2.weight": (4, 4 * 2),
        "3.weight": (4, 8),
        "5.weight": (16, 4),
    }


def test_blocks_quantize_each_block_of_input_channels_with_its_own_scale(case: Case) -> None:
    simulation = calibrated(case, {"2": LayerPrecision(weight_bitwidth=4, block_size=8)})
    weight = case.adapter.model.state_dict()["2.weight"]
    scales = torch.tensor([entry["scale"] for entry in simulation.encodings().parameters["2.weight"]]).reshape(4, 2)
    blocks = weight.reshape(4, 2, 8)
    expected = torch.maximum(blocks.amax(2) / 7, -blocks.amin(2) / 8)
    torch.testing.assert_close(scales, expected)


def test_one_block_is_a_scale_per_channel(case: Case) -> None:
    simulation = calibrated(case, {"2": LayerPrecision(weight_bitwidth=4, block_size=16)})
    assert bits(simulation.encodings())["2.weight"] == (4, 4)


def test_blocks_that_do_not_divide_the_channels_are_refused(case: Case) -> None:
    with pytest.raises(UsageError, match="`module:2` has 16 input channels, which blocks of 3 do not divide"):
        calibrated(case, {"2": LayerPrecision(weight_bitwidth=4, block_size=3)})


def test_a_file_says_the_bits_and_blocks_whatever_the_settings(case: Case, tmp_path: Path) -> None:
    layers = {"2": LayerPrecision(weight_bitwidth=4, block_size=8), "3": LayerPrecision(weight_bitwidth=16)}
    simulation = calibrated(case, layers)
    save_simulation(simulation, tmp_path / "g.encodings")
    again = load_simulation(tmp_path / "g.encodings", case.adapter, case.samples[0], load_settings({75}))
    assert again.encodings() == simulation.encodings()
    assert torch.equal(again(case.samples[0])["y"], simulation(case.samples[0])["y"])


def test_encodings_that_fit_neither_channels_nor_blocks_are_refused(case: Case) -> None:
    entries = calibrated(case, {}).encodings().parameters["0.weight"]
    with pytest.raises(EncodingsError, match=r"`0.weight` has 48 encodings, and its shape is \(16, 8, 3, 3\)"):
        Simulation(case.adapter, case.samples[0], load_settings({75}), {"0.weight": entries * 3})


@pytest.mark.parametrize(
    ("arch", "activation", "precision", "message"),
    [
        (
            69,
            16,
            {"weight_bitwidth": 16},
            "`module:2`: HTP takes no weights of 16 bits with a scale per channel on v68",
        ),
        (75, 8, {"weight_bitwidth": 16}, "16 bits with a scale per channel on v73.* with 8-bit activations"),
        (
            75,
            8,
            {"weight_bitwidth": 4, "block_size": 8},
            "4 bits with a scale per block on v73.* with 8-bit activations",
        ),
    ],
)
def test_what_the_compiler_refuses_is_refused_first(
    case: Case, arch: int, activation: int, precision: dict[str, int], message: str
) -> None:
    settings = load_settings({arch}).with_bitwidths(weight=8, activation=activation, per_channel=True)
    layers = {"2": LayerPrecision.model_validate(precision)}
    with pytest.raises(UsageError, match=message) as error:
        Simulation(case.adapter, case.samples[0], settings.model_copy(update={"layers": layers}))
    assert "bits per channel" in error.value.hint


def test_4_bits_need_a_scale_per_channel(case: Case) -> None:
    settings = load_settings({75}).with_bitwidths(weight=4, activation=16, per_channel=False)
    with pytest.raises(UsageError, match="`module:0`: HTP takes no weights of 4 bits with a scale per tensor"):
        Simulation(case.adapter, case.samples[0], settings)


def test_blocks_of_a_larger_kernel_are_refused(case: Case) -> None:
    with pytest.raises(UsageError, match="`module:0` is a convolution of 3x3, for which HTP takes no blocks"):
        calibrated(case, {"0": LayerPrecision(weight_bitwidth=8, block_size=4)})


def test_blocks_that_fill_no_32_bits_are_refused(case: Case) -> None:
    with pytest.raises(UsageError, match="`module:2`: HTP takes no blocks of 4 weights of 4 bits") as error:
        calibrated(case, {"2": LayerPrecision(weight_bitwidth=4, block_size=4)})
    assert "multiple of 8" in error.value.hint
