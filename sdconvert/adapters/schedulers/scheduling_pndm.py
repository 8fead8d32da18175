"""PNDM (Liu et al. 2022, arXiv:2202.09778): Runge-Kutta to start with, or a repeated step, then four-step Adams."""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from diffusers.schedulers.scheduling_pndm import PNDMScheduler

from sdconvert.adapters.schedulers.base import Options, SchedulerAdapter, SchedulerRegistry, Step
from sdconvert.adapters.schedulers.combination import Combination, value

_HELD, _MIX = "held", "mix"  # the sample that a Runge-Kutta or repeated step starts from; the slopes so far
_PAST = ("output_1", "output_2", "output_3")
# Adams-Bashforth of two to four steps, newest first.
_ADAMS = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


@SchedulerRegistry.register(PNDMScheduler)
class PNDMSchedulerAdapter(SchedulerAdapter):
    """Covers `PNDMScheduler` in both of its modes; it makes more model calls than steps.

    With `skip_prk_steps`, as Stable Diffusion has it, the second timestep is called twice: once from the result of a
    first Euler step, and again from its start, with the mean of both predictions.
    """

    expressible: ClassVar[Options] = {"prediction_type": ("epsilon", "v_prediction")}

    def start_alpha_cumprod(self) -> float:
        """See `SchedulerAdapter.start_alpha_cumprod`."""
        return float(self.scheduler.alphas_cumprod[int(self.scheduler.timesteps[0])])

    def solve(self) -> Iterator[Step]:
        """Algorithm 2: 12 calls of Runge-Kutta unless they are skipped, then the multistep formula."""
        warm_up = 0 if self.config.skip_prk_steps else len(self.scheduler.prk_timesteps)
        past = 0
        for index, timestep in enumerate(self.scheduler.timesteps.tolist()):
            if index < warm_up:
                update = self._runge_kutta(index, timestep)
                remembered = index % 4 == 0
            else:
                update = self._multistep(index, timestep, past)
                remembered = index != 1  # the call that repeats a timestep leaves no prediction behind
            values = [*([self.output] if remembered else []), *map(value, _PAST)]
            past = min(past + remembered, len(_PAST))
            update |= dict(zip(_PAST[:past], values, strict=False))
            yield Step(timestep, update)

    def _runge_kutta(self, index: int, timestep: int) -> dict[str, Combination]:
        stage = index % 4
        half = self.config.num_train_timesteps // self.scheduler.num_inference_steps // 2
        origin = int(self.scheduler.prk_timesteps[index - stage])
        held = self.sample if stage == 0 else value(_HELD)
        weight = (1 / 6, 1 / 3, 1 / 3, 1 / 6)[stage]
        mix = weight * self.output if stage == 0 else value(_MIX) + weight * self.output
        slope = mix if stage == 3 else self.output
        previous = timestep if index % 2 else timestep - half
        return {"sample": self._transfer(held, slope, origin, previous), _HELD: held, _MIX: mix}

    def _multistep(self, index: int, timestep: int, past: int) -> dict[str, Combination]:
        stride = self.config.num_train_timesteps // self.scheduler.num_inference_steps
        if index == 0:
            return {"sample": self._transfer(self.sample, self.output, timestep, timestep - stride), _HELD: self.sample}
        if index == 1:
            mean = (self.output + value(_PAST[0])) / 2.0
            return {"sample": self._transfer(value(_HELD), mean, timestep + stride, timestep)}
        predictions = [self.output, *map(value, _PAST[:past])]
        slope = Combination({})
        for coefficient, prediction in zip(_ADAMS[len(predictions)], predictions, strict=True):
            slope = slope + coefficient * prediction
        return {"sample": self._transfer(self.sample, slope, timestep, timestep - stride)}

    def _transfer(self, sample: Combination, slope: Combination, timestep: int, previous: int) -> Combination:
        """From `timestep` to `previous` along a predicted noise: the paper's transfer part `φ`."""
        scheduler = self.scheduler
        now = np.float64(scheduler.alphas_cumprod[timestep])
        then = np.float64(scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod)
        if self.config.prediction_type == "v_prediction":
            slope = np.sqrt(now) * slope + np.sqrt(1 - now) * sample
        divisor = now * np.sqrt(1 - then) + np.sqrt(now * (1 - now) * then)
        moved: Combination = sample * np.sqrt(then / now) - slope * ((then - now) / divisor)
        return moved
