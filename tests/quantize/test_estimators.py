"""Range estimators: what each one clips, whose tensors it reaches, and that all data counts, in any order."""

import math
import re
from collections.abc import Mapping

import pytest
import torch
from static_graphs import Case, module_case
from torch import Tensor, nn

from sdconvert.config import RangeEstimator
from sdconvert.errors import UsageError
from sdconvert.metrics import worst_sqnr_db
from sdconvert.quantize.estimators import require_known_kinds
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Simulation

MSE = RangeEstimator(estimator="mse")
PERCENTILE = RangeEstimator(estimator="percentile", percentile=95.0)
MIN_MAX = RangeEstimator()


class Attention(nn.Module):
    """Scores with a mask between a linear layer and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 8)
        self.mask: Tensor
        self.register_buffer("mask", torch.zeros(6, 6).index_fill_(1, torch.tensor([5]), -100.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.to_q(x) @ x.transpose(-1, -2) + self.mask, -1) @ x


@pytest.fixture
def case() -> Case:
    """A layer whose input has one value far out in each sample, another one each time."""
    torch.manual_seed(0)
    case = module_case(Attention(), 1, 6, 8)
    for index, sample in enumerate(case.samples):
        sample["x"][0, 0, 0] = 40.0 + index
    return case


def calibrated(case: Case, estimators: Mapping[str, RangeEstimator], bitwidth: int = 8) -> Simulation:
    settings = load_settings({75}).with_bitwidths(weight=8, activation=bitwidth, per_channel=True)
    simulation = Simulation(case.adapter, case.samples[0], settings.model_copy(update={"estimators": estimators}))
    simulation.calibrate(case.samples)
    return simulation


def bounds(simulation: Simulation) -> dict[str, tuple[float, float]]:
    return {key: (e["min"], e["max"]) for key, (e,) in simulation.encodings().activations.items()}


def test_each_kind_has_its_own_estimator_and_default_the_rest(case: Case) -> None:
    plain = bounds(calibrated(case, {"default": MIN_MAX}))
    changed = bounds(calibrated(case, {"default": MIN_MAX, "input": PERCENTILE}))
    assert plain.keys() == changed.keys()
    assert {key for key in plain if plain[key] != changed[key]} == {":x"}
    assert plain[":x"][1] == pytest.approx(42, rel=0.01)
    assert changed[":x"][1] < 5
    every = bounds(calibrated(case, {"default": PERCENTILE, "input": MIN_MAX}))
    assert every[":x"] == plain[":x"]
    assert every["to_q:linear.0"] != plain["to_q:linear.0"]


def test_percentiles_are_those_of_all_samples(case: Case) -> None:
    low, high = bounds(calibrated(case, {"input": PERCENTILE}))[":x"]
    values = torch.cat([sample["x"].flatten() for sample in case.samples])
    step = 2 * (values.max() - values.min()) / 2048 + (high - low) / 255
    assert math.isclose(high, values.quantile(0.95, interpolation="lower"), abs_tol=step)
    assert math.isclose(low, values.quantile(0.05, interpolation="higher"), abs_tol=step)


@pytest.mark.parametrize("estimator", [MSE, PERCENTILE], ids=lambda one: one.estimator)
def test_the_order_of_samples_does_not_matter(case: Case, estimator: RangeEstimator) -> None:
    first = calibrated(case, {"default": estimator}).encodings()
    case.samples.reverse()
    assert calibrated(case, {"default": estimator}).encodings() == first


def test_mse_rounds_the_tensor_with_less_error_than_min_max(case: Case) -> None:
    for sample in case.samples:
        sample["x"][0, 0, 0] = 6.0
    values = {"x": torch.cat([sample["x"].flatten() for sample in case.samples])}
    figures = {}
    for estimator in (MIN_MAX, MSE):
        simulation = calibrated(case, {"input": estimator})
        with torch.no_grad():
            quantized = simulation.quantizers.activations[":x"](values["x"]).as_subclass(Tensor)
        figures[estimator.estimator] = worst_sqnr_db(values, {"x": quantized})
    assert figures["mse"] >= figures["min_max"] - 0.1


def test_fixed_ranges_and_masks_keep_their_rules(case: Case) -> None:
    found = bounds(calibrated(case, {"default": PERCENTILE}))
    assert found[":softmax.0"] == pytest.approx((0, 1), abs=1e-3)
    scores, masked = found[":matmul.0"], found[":add.0"]
    assert masked[0] == pytest.approx(scores[0] - 20, rel=0.02)
    assert masked[1] == pytest.approx(scores[1], rel=0.02)


def test_the_margin_at_16_bits_is_for_min_max_alone(case: Case) -> None:
    by_name = {one.estimator: bounds(calibrated(case, {"input": one}, 16))[":x"][1] for one in (MIN_MAX, PERCENTILE)}
    assert by_name["min_max"] == pytest.approx(42 * 1.25, rel=0.01)
    assert by_name["percentile"] < 5


def test_a_tensor_of_one_value_keeps_a_grid(case: Case) -> None:
    for sample in case.samples:
        sample["x"].fill_(1.0)
    low, high = bounds(calibrated(case, {"default": MSE}))[":x"]
    assert low <= 0 <= 1 <= high * 1.01


@pytest.mark.parametrize(
    ("kind", "message", "hint"),
    [
        ("liner", "`liner` makes no tensor of any graph", "`linear`"),
        ("softmax", "the range of softmax is fixed", "leave `softmax` out"),
    ],
)
def test_an_estimator_without_effect_is_an_error(case: Case, kind: str, message: str, hint: str) -> None:
    simulation = calibrated(case, {})
    kinds, fixed = set(simulation.quantizers.kinds.values()), simulation.settings.fixed_ranges
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        require_known_kinds({kind: MSE}, kinds, fixed)
    assert hint in error.value.hint
    require_known_kinds({"default": MSE, "linear": MSE, "matmul_second_operand": MSE}, kinds, fixed)
