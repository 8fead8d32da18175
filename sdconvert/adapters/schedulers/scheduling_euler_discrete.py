"""Euler's method on the noise level (Karras et al. 2022, arXiv:2206.00364, algorithm 2 without churn)."""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

from sdconvert.adapters.schedulers.base import Options, SchedulerAdapter, SchedulerRegistry, Step
from sdconvert.adapters.schedulers.combination import Combination


@SchedulerRegistry.register(EulerDiscreteScheduler)
class EulerDiscreteSchedulerAdapter(SchedulerAdapter):
    """Covers `EulerDiscreteScheduler`: its sample is `x₀ + σ·ε`, so the model gets it scaled by `1/sqrt(σ² + 1)`.

    Churn adds noise by arguments of `step` that no table has a place for.
    """

    expressible: ClassVar[Options] = {"prediction_type": ("epsilon", "sample", "v_prediction")}

    def start_alpha_cumprod(self) -> float:
        """See `SchedulerAdapter.start_alpha_cumprod`."""
        return 1.0 / (1.0 + float(self.scheduler.sigmas[0]) ** 2)

    def start_scale(self) -> float:
        """`sqrt(σ² + 1)`, whatever the spacing.

        `init_noise_sigma` is `σ` for two of the three spacings: right for a start from noise alone, 0.2 % too little
        signal for one from a picture.
        """
        return float(np.sqrt(float(self.scheduler.sigmas[0]) ** 2 + 1.0))

    def solve(self) -> Iterator[Step]:
        """`x' = x + (σ' - σ)·(x - x₀)/σ`."""
        sigmas = self.scheduler.sigmas.numpy()
        for timestep, sigma, following in zip(self.timesteps, sigmas, sigmas[1:], strict=False):
            derivative = (self.sample - self._clean(sigma)) / sigma
            yield Step(timestep, {"sample": self.sample + (following - sigma) * derivative}, 1 / np.sqrt(sigma**2 + 1))

    def _clean(self, sigma: np.float64) -> Combination:
        if self.config.prediction_type == "epsilon":
            return self.sample - sigma * self.output
        if self.config.prediction_type == "sample":
            return self.output
        clean: Combination = self.sample / (sigma**2 + 1) - self.output * (sigma / np.sqrt(sigma**2 + 1))
        return clean
