"""UniPC: a multistep predictor whose result is corrected once the model was asked at it (arXiv:2302.04867)."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from sdconvert.adapters.schedulers.base import Options, SchedulerRegistry, Step
from sdconvert.adapters.schedulers.combination import Combination, value
from sdconvert.adapters.schedulers.exponential import PAST, ExponentialSchedulerAdapter, Level, weighted

_CORRECTED = "corrected"


@SchedulerRegistry.register(UniPCMultistepScheduler)
class UniPCMultistepSchedulerAdapter(ExponentialSchedulerAdapter):
    """Covers `UniPCMultistepScheduler` of order 1 to 3, PASD's own sampler.

    The model is asked at the predicted sample; the next prediction starts from the corrected one.
    """

    expressible: ClassVar[Options] = {
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "solver_order": (2, 1, 3),
        "solver_p": (None,),
        "thresholding": (False,),
        "use_flow_sigmas": (False,),
        "use_dynamic_shifting": (False,),
    }

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        self.predicts_data = self.config.predict_x0

    def solve(self) -> Iterator[Step]:
        """Correct the sample with the new prediction, then predict the next one (algorithms 1 and 2)."""
        levels, order = self.levels(), 0
        for index, timestep in enumerate(self.timesteps):
            prediction = self.converted(levels[index])
            past = list(map(value, PAST))
            sample = self.sample
            if index > 0 and index - 1 not in self.config.disable_corrector:
                window = levels[index - order : index + 1]
                sample = self._correct(window, past[:order], prediction)
            order = self._order(index)
            predicted = self._predict(levels[index + 1 - order : index + 2], sample, [prediction, *past[: order - 1]])
            update = {"sample": predicted, _CORRECTED: sample}
            yield Step(timestep, update | self.remembered(prediction, min(index + 1, self.config.solver_order)))

    def _order(self, index: int) -> int:
        left = len(self.scheduler.timesteps) - index
        order: int = min(self.config.solver_order, index + 1)
        return min(order, left) if self.config.lower_order_final else order

    def _predict(self, levels: Sequence[Level], sample: Combination, predictions: Sequence[Combination]) -> Combination:
        """UniP: from the last level but one to the last, with predictions newest first."""
        system = _System(self, levels)
        order = len(predictions)
        if order == 2:
            weights = [np.float64(0.5)]  # what the system's solution tends to for short steps; the order is the same
        else:
            weights = list(np.linalg.solve(system.matrix[:-1, :-1], system.right[:-1])) if order > 2 else []
        return system.first_order(sample, predictions[0]) - system.scale * weighted(
            weights, system.differences(predictions)
        )

    def _correct(self, levels: Sequence[Level], predictions: Sequence[Combination], newest: Combination) -> Combination:
        """UniC: the same step again, now that the prediction at its end is known."""
        system = _System(self, levels)
        order = len(predictions)
        weights = [np.float64(0.5)] if order == 1 else list(np.linalg.solve(system.matrix, system.right))
        terms = [*system.differences(predictions), newest - predictions[0]]
        return system.first_order(value(_CORRECTED), predictions[0]) - system.scale * weighted(weights, terms)


class _System:
    """The linear system of one step: its weights make the expansion exact to the order.

    Args:
        adapter: Of the scheduler.
        levels: Levels of the predictions used, oldest first, then that of the step's end.
    """

    def __init__(self, adapter: UniPCMultistepSchedulerAdapter, levels: Sequence[Level]) -> None:
        *past, now, then = levels
        self.carried, factor, z = adapter.decay(now, then)
        self.first = factor * np.expm1(z)
        base = z if adapter.config.solver_type == "bh1" else np.expm1(z)
        self.scale = factor * base
        length = then.log_snr - now.log_snr
        self.ratios = [(one.log_snr - now.log_snr) / length for one in reversed(past)]
        places = np.array([*self.ratios, 1.0])
        order = len(places)
        self.matrix = np.stack([places**power for power in range(order)])
        self.right = np.array([moment / base for moment in _moments(z, order)])

    def first_order(self, sample: Combination, prediction: Combination) -> Combination:
        """The step with a constant prediction."""
        result: Combination = sample * self.carried - prediction * self.first
        return result

    def differences(self, predictions: Sequence[Combination]) -> list[Combination]:
        """Divided differences of earlier predictions to the newest one."""
        return [(older - predictions[0]) / ratio for older, ratio in zip(predictions[1:], self.ratios, strict=True)]


def _moments(z: np.float64, order: int) -> Iterator[np.float64]:
    """`k!·z·φ_{k+1}(z)` for k = 1…order, with `φ_1 = (e^z - 1)/z` and `φ_{k+1} = (φ_k - 1/k!)/z`."""
    factorial = 1.0
    phi = np.expm1(z) / z - 1.0
    for k in range(1, order + 1):
        yield phi * factorial
        factorial *= k + 1
        phi = phi / z - 1.0 / factorial
