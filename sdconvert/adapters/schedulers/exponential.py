"""What DPM-Solver and UniPC share: both integrate exactly over `λ = log(α/σ)`, in a data or a noise prediction."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sdconvert.adapters.schedulers.base import SchedulerAdapter
from sdconvert.adapters.schedulers.combination import Combination, value

PAST = ("prediction_1", "prediction_2", "prediction_3")
"""Converted predictions of earlier steps, newest first."""


class Level(NamedTuple):
    """One noise level of `x = alpha·x₀ + sigma·ε`."""

    alpha: np.float64
    sigma: np.float64

    @property
    def log_snr(self) -> np.float64:
        """`λ`; infinite where no noise is left."""
        result: np.float64 = np.log(self.alpha) - np.log(self.sigma)
        return result


class ExponentialSchedulerAdapter(SchedulerAdapter):
    """Levels and predictions of a scheduler whose `sigmas` are `σ/α`, one more than timesteps."""

    predicts_data: bool

    def start_alpha_cumprod(self) -> float:
        """See `SchedulerAdapter.start_alpha_cumprod`."""
        return 1.0 / (1.0 + float(self.scheduler.sigmas[0]) ** 2)

    def levels(self) -> list[Level]:
        """Of every timestep, and of the result."""
        ratios = self.scheduler.sigmas.numpy()
        alphas = 1.0 / np.sqrt(ratios**2 + 1.0)
        return [Level(alpha, ratio * alpha) for alpha, ratio in zip(alphas, ratios, strict=True)]

    def converted(self, level: Level) -> Combination:
        """The model's output as a prediction of `x₀`, or of `ε`."""
        kind = self.config.prediction_type
        if self.predicts_data:
            if kind == "epsilon":
                return (self.sample - level.sigma * self.output) / level.alpha
            if kind == "v_prediction":
                return level.alpha * self.sample - level.sigma * self.output
            return self.output
        if kind == "sample":
            return (self.sample - level.alpha * self.output) / level.sigma
        if kind == "v_prediction":
            return level.alpha * self.output + level.sigma * self.sample
        return self.output

    def decay(self, now: Level, then: Level) -> tuple[np.float64, np.float64, np.float64]:
        """How a step carries the sample, how it weighs predictions, and its signed length.

        Returns:
            Factor of the sample, factor of the integral over predictions, and `-h` for data or `h` for noise, where
            `h = λ' - λ`.
        """
        length = then.log_snr - now.log_snr
        if self.predicts_data:
            return then.sigma / now.sigma, then.alpha, -length
        return then.alpha / now.alpha, then.sigma, length

    def remembered(self, newest: Combination, count: int) -> dict[str, Combination]:
        """The newest prediction and `count - 1` earlier ones, each one place on."""
        return dict(zip(PAST[:count], [newest, *map(value, PAST)], strict=False))


def weighted(coefficients: Sequence[np.float64], terms: Sequence[Combination]) -> Combination:
    """`Σ coefficient · term`; nothing for no terms."""
    total = Combination({})
    for coefficient, term in zip(coefficients, terms, strict=True):
        total = total + coefficient * term
    return total
