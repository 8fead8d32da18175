"""Which tensor gets which bit-width and symmetry, per generation of the NPU: the JSON files beside this one."""

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sdconvert.config import LayerPrecision, RangeEstimator, Recipe
from sdconvert.errors import UsageError
from sdconvert.soc import find_soc

_NEWEST = 85


class Grid(BaseModel):
    """The integer grid of one kind of tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bitwidth: Literal[4, 8, 16]
    symmetric: bool
    per_channel: bool = False
    block_size: int | None = Field(default=None, description="Input channels that share a scale; all if not given.")


class QuantizerSettings(BaseModel):
    """The settings of one generation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1]
    name: str
    architectures: tuple[int, ...]
    source: str
    activations: Grid
    parameters: dict[str, Grid]
    matmul_second_operand: Grid
    weight_precisions: dict[int, dict[Literal["tensor", "channel", "block"], tuple[int, ...]]] = Field(
        description="Bits per weight that the compiler takes in convolutions and linear layers, by bits per activation "
        "and by what shares a scale; as measured by tests/export/test_precisions.py."
    )
    range_margin: float = Field(
        ge=0,
        description="Part by which 16-bit activation ranges exceed the calibration data. A quarter costs 2 of 90 dB, "
        "and keeps inputs that go further from being clipped (38 -> 30 dB on one output of a ControlNet).",
    )
    ranges: dict[int, dict[str, tuple[float, float]]] = Field(
        description="Fixed output ranges by bits per activation and op. The HTP cuts 16-bit probabilities off where it "
        "should round, and those of 4096 keys lose 3 % of their sum. On a step of exactly two of its own, 2 / 65536, "
        "with zero in the middle, the provider converts them, and that rounds (attention: 30 -> 60 dB)."
    )
    integers_only: bool = Field(
        default=False, description="Whether norms and SiLU are exported without floating point, which some chips lack."
    )
    layers: dict[str, LayerPrecision] = Field(
        default={}, description="Weights with a precision of their own, by pattern; the last one that fits counts."
    )
    estimators: dict[str, RangeEstimator] = Field(
        default={}, description="How all other ranges are taken, by op and `default`."
    )

    @property
    def fixed_ranges(self) -> dict[str, tuple[float, float]]:
        """Output ranges by op that no data changes."""
        return self.ranges.get(self.activations.bitwidth, {})

    def with_bitwidths(self, *, weight: int, activation: int, per_channel: bool) -> "QuantizerSettings":
        """The same settings with the recipe's bit-widths; norms, and what MatMul demands, stay.

        Tables that are added or looked up meet activations, and so have their bit-width.
        """
        weights = {"bitwidth": weight, "per_channel": per_channel}
        tables = {"bitwidth": activation}
        changes: dict[str, dict[str, Any]] = {
            "conv2d": weights,
            "linear": weights,
            "add": tables,
            "embedding": tables,
        }
        parameters = {op: grid.model_copy(update=changes.get(op, {})) for op, grid in self.parameters.items()}
        activations = self.activations.model_copy(update=tables)
        return self.model_copy(update={"activations": activations, "parameters": parameters})


def load_settings(architectures: set[int]) -> QuantizerSettings:
    """The settings that cover all the given HTP architectures (68 … 85).

    Raises:
        UsageError: No one file covers them all, or none covers one of them.
    """
    files = sorted(resources.files(__name__).iterdir(), key=lambda file: file.name)
    every = [
        QuantizerSettings.model_validate(json.loads(file.read_text())) for file in files if file.name.endswith(".json")
    ]
    for settings in every:
        if architectures <= set(settings.architectures):
            return settings
    groups = "; ".join(f"{s.name}: {', '.join(f'v{a}' for a in s.architectures)}" for s in every)
    asked = ", ".join(f"v{arch}" for arch in sorted(architectures))
    raise UsageError(
        f"no quantizer settings cover {asked} together ({groups})",
        hint="convert for SoCs of one group per run: they need different precisions in attention",
    )


def settings_of(parameters: Mapping[str, Sequence[Any]]) -> QuantizerSettings:
    """Settings whose quantizers take the grids of a file: those bring their bit-width and symmetry, not their shape.

    Args:
        parameters: Entries of the file by parameter, one per tensor or one per channel.
    """
    per_channel = any(len(entries) > 1 for entries in parameters.values())
    return load_settings({_NEWEST}).with_bitwidths(weight=8, activation=16, per_channel=per_channel)


def quantizer_settings(recipe: Recipe) -> QuantizerSettings:
    """The settings of the recipe's SoCs with the recipe's bit-widths.

    Raises:
        UsageError: An unknown SoC, or SoCs of different groups.
    """
    settings = load_settings({find_soc(name).arch for name in recipe.qnn.socs})
    quantize = recipe.quantize
    return settings.with_bitwidths(
        weight=quantize.weight_bitwidth, activation=quantize.activation_bitwidth, per_channel=quantize.per_channel
    ).model_copy(update={"layers": quantize.layers, "estimators": quantize.ranges})
