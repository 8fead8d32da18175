"""DDIM (Song et al. 2020, arXiv:2010.02502), eta = 0."""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from sdconvert.adapters.schedulers.base import Options, SchedulerAdapter, SchedulerRegistry, Step
from sdconvert.adapters.schedulers.combination import Combination


@SchedulerRegistry.register(DDIMScheduler)
class DDIMSchedulerAdapter(SchedulerAdapter):
    """Covers `DDIMScheduler`: one value lives from step to step, the sample.

    Clipping the predicted picture is not linear; eta is an argument of `step` that no table has a place for.
    """

    expressible: ClassVar[Options] = {
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "clip_sample": (False,),
        "thresholding": (False,),
    }

    def start_alpha_cumprod(self) -> float:
        """See `SchedulerAdapter.start_alpha_cumprod`."""
        return float(self.scheduler.alphas_cumprod[int(self.scheduler.timesteps[0])])

    def solve(self) -> Iterator[Step]:
        """`x' = sqrt(ᾱ')·x₀ + sqrt(1 - ᾱ')·ε` (eq. 12)."""
        scheduler = self.scheduler
        stride = self.config.num_train_timesteps // scheduler.num_inference_steps
        for timestep in scheduler.timesteps.tolist():
            # Not the next timestep of the list but one stride on, as diffusers has it; trailing spacing shows it.
            previous = timestep - stride
            alpha_cumprod = np.float64(scheduler.alphas_cumprod[timestep])
            following = np.float64(
                scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
            )
            clean, noise = self._predictions(alpha_cumprod)
            yield Step(timestep, {"sample": np.sqrt(following) * clean + np.sqrt(1 - following) * noise})

    def _predictions(self, alpha_cumprod: np.float64) -> tuple[Combination, Combination]:
        """The clean sample and the noise in it, of `x = alpha·x₀ + sigma·ε`."""
        alpha, sigma = np.sqrt(alpha_cumprod), np.sqrt(1 - alpha_cumprod)
        if self.config.prediction_type == "epsilon":
            return (self.sample - sigma * self.output) / alpha, self.output
        if self.config.prediction_type == "sample":
            return self.output, (self.sample - alpha * self.output) / sigma
        return alpha * self.sample - sigma * self.output, alpha * self.output + sigma * self.sample
