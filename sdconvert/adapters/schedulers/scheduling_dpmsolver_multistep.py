"""DPM-Solver and DPM-Solver++, multistep (Lu et al. 2022, arXiv:2206.00927 and 2211.01095)."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

from sdconvert.adapters.schedulers.base import Options, SchedulerRegistry, Step
from sdconvert.adapters.schedulers.combination import Combination, value
from sdconvert.adapters.schedulers.exponential import PAST, ExponentialSchedulerAdapter, Level


@SchedulerRegistry.register(DPMSolverMultistepScheduler)
class DPMSolverMultistepSchedulerAdapter(ExponentialSchedulerAdapter):
    """Covers `DPMSolverMultistepScheduler` of order 1 to 3; its stochastic variants draw noise in every step."""

    expressible: ClassVar[Options] = {
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "algorithm_type": ("dpmsolver++", "dpmsolver"),
        "solver_order": (2, 1, 3),
        "thresholding": (False,),
        "use_flow_sigmas": (False,),
        "use_dynamic_shifting": (False,),
        "variance_type": (None,),
    }

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        self.predicts_data = self.config.algorithm_type == "dpmsolver++"

    def solve(self) -> Iterator[Step]:
        """Orders rise with the predictions at hand, and fall again in the last steps where the config says so."""
        levels = self.levels()
        for index, timestep in enumerate(self.timesteps):
            prediction = self.converted(levels[index])
            order = self._order(index)
            predictions = [prediction, *map(value, PAST[: order - 1])]
            update = {"sample": self._advance(levels[max(index + 1 - order, 0) : index + 2], predictions)}
            yield Step(timestep, update | self.remembered(prediction, min(index + 1, self.config.solver_order - 1)))

    def _order(self, index: int) -> int:
        count, config = len(self.scheduler.timesteps), self.config
        few = config.lower_order_final and count < 15
        order: int = min(config.solver_order, index + 1)
        if index == count - 1 and (few or config.euler_at_final or config.final_sigmas_type == "zero"):
            return 1
        return min(order, 2) if index == count - 2 and few else order

    def _advance(self, levels: Sequence[Level], predictions: Sequence[Combination]) -> Combination:
        """Taylor expansion of the prediction in `λ` around the present level.

        Args:
            levels: The levels of the predictions used, oldest first, then that of the result.
            predictions: As many as the order, newest first.
        """
        *past, now, then = levels
        carried, factor, z = self.decay(now, then)
        first = np.expm1(z)
        result: Combination = self.sample * carried - predictions[0] * (factor * first)
        if not past:
            return result
        # Differences per unit of this step's length.
        length = then.log_snr - now.log_snr
        ratio = (now.log_snr - past[-1].log_snr) / length
        slope = (predictions[0] - predictions[1]) / ratio
        if len(past) == 1:
            weight = 0.5 * first if self.config.solver_type == "midpoint" else first / z - 1.0
            result -= slope * (factor * weight)
            return result
        older_ratio = (past[-1].log_snr - past[-2].log_snr) / length
        older_slope = (predictions[1] - predictions[2]) / older_ratio
        bend = (slope - older_slope) / (ratio + older_ratio)
        slope = slope + bend * ratio
        result -= slope * (factor * (first / z - 1.0)) + bend * (factor * ((first - z) / z**2 - 0.5))
        return result
