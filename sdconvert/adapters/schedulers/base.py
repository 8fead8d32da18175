"""From a scheduler of diffusers to its table: what every sampler shares, and the check that the table is the sampler.

The timesteps and noise levels are diffusers' own, so that every spacing works; the coefficients are computed from them
in float64, by the formulas of the papers, on combinations of named values instead of tensors (`combination.py`).
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdconvert.adapters.schedulers.combination import Combination, value
from sdconvert.adapters.schedulers.spec import (
    OUTPUT,
    SAMPLE,
    Noising,
    Replay,
    SchedulerSpec,
    SchedulerStep,
    combine,
    drop_unread,
)
from sdconvert.errors import UnsupportedSchedulerError, UsageError
from sdconvert.registry import ClassRegistry

_TOLERANCE = 1e-5  # of the largest terms added up; both are float64, but DPM-Solver rounds its sample to float32

Options = Mapping[str, tuple[Any, ...]]


class Step(NamedTuple):
    """One step of a sampler in symbols."""

    timestep: float
    update: dict[str, Combination]
    input_scale: float = 1.0


class SchedulerAdapter(ABC):
    """Covers one scheduler of diffusers, with its timesteps set.

    Args:
        scheduler: A copy that the adapter may keep; its tensors are float64.
    """

    expressible: ClassVar[Options]
    """Values of the options whose other values a table cannot express, or diffusers computes otherwise."""

    sample: ClassVar[Combination] = value(SAMPLE)
    output: ClassVar[Combination] = value(OUTPUT)

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.config = scheduler.config

    @property
    def timesteps(self) -> list[float]:
        """Of every model call."""
        return [float(timestep) for timestep in self.scheduler.timesteps]

    @abstractmethod
    def solve(self) -> Iterator[Step]:
        """The steps in order; coefficients may come out infinite where the sampler itself divides by zero."""

    @abstractmethod
    def start_alpha_cumprod(self) -> float:
        """`ᾱ` of the noise level at which the first step takes the sample to be."""

    def start_scale(self) -> float:
        """What a variance-preserving sample is multiplied by to become this sampler's."""
        return 1.0

    def noisings(self, added_noise_level: int | None) -> tuple[Noising, ...]:
        """The forward diffusion of a picture to the start of the table.

        `added_noise_level` is PASD's second noising (it asks for timestep 900), and a timestep of the **training**
        schedule here: `ᾱ = alphas_cumprod[level]`, for every scheduler and whether sampling visits it or not. The
        scheduler's own `add_noise` cannot be asked. Since diffusers 0.21, UniPC's and DPM-Solver's look the timestep
        up among those of the sampling run and take the **last** entry for one that is not there: of 20 steps 899 and
        949 are two, 900 is none, so PASD's pinned version noises as for timestep 50 (α 0.9755 instead of 0.1190,
        measured), and the number asked for changes nothing. Following that would keep a request without effect, and
        make the bundle depend on the version of diffusers that wrote it. What is decided here is what PASD's authors
        ran when they published (0.20), and what the networks' training means by a timestep.

        Raises:
            UsageError: The level is no timestep of the training schedule.
        """
        alphas_cumprod = [self.start_alpha_cumprod()]
        if added_noise_level is not None:
            levels = len(self.scheduler.alphas_cumprod)
            if not 0 <= added_noise_level < levels:
                raise UsageError(f"noise level {added_noise_level} is no timestep", hint=f"choose 0 to {levels - 1}")
            alphas_cumprod.append(float(self.scheduler.alphas_cumprod[added_noise_level]))
        scales = [1.0] * (len(alphas_cumprod) - 1) + [self.start_scale()]
        return tuple(
            Noising(signal=scale * math.sqrt(alpha), noise=scale * math.sqrt(max(1.0 - alpha, 0.0)))
            for scale, alpha in zip(scales, alphas_cumprod, strict=True)
        )

    def spec(self, added_noise_level: int | None) -> SchedulerSpec:
        """Write the table.

        Raises:
            UnsupportedSchedulerError: A coefficient is not finite.
            UsageError: As `noisings`.
        """
        solved = self._solved()
        steps = [
            SchedulerStep(timestep=float(step.timestep), input_scale=float(step.input_scale), update=update)
            for step, update in solved
        ]
        return SchedulerSpec(
            scheduler=self.name,
            prediction_type=self.config.prediction_type,
            init_noise_sigma=float(self.scheduler.init_noise_sigma),
            noisings=self.noisings(added_noise_level),
            steps=drop_unread(steps),
        )

    def _solved(self) -> list[tuple[Step, dict[str, dict[str, float]]]]:
        solved: list[tuple[Step, dict[str, dict[str, float]]]] = []
        try:
            with np.errstate(all="ignore"):
                for step in self.solve():
                    update = {name: terms.coefficients() for name, terms in step.update.items()}
                    if not all(math.isfinite(number) for terms in update.values() for number in terms.values()):
                        raise np.linalg.LinAlgError
                    solved.append((step, update))
        except np.linalg.LinAlgError as error:
            raise UnsupportedSchedulerError(
                f"{self.name} divides by zero in step {len(solved)} of {len(self.timesteps)} with "
                f"prediction_type={self.config.prediction_type!r}: no signal or no noise is left there",
                hint="choose another number of steps, timestep_spacing, final_sigmas_type or prediction_type",
            ) from error
        return solved

    @property
    def name(self) -> str:
        """Class name of the scheduler."""
        return type(self.scheduler).__name__


SchedulerRegistry: ClassRegistry[type[SchedulerAdapter]] = ClassRegistry(
    "scheduler", base=SchedulerAdapter, error=UnsupportedSchedulerError
)


def scheduler_spec(scheduler: Any, num_inference_steps: int, *, added_noise_level: int | None = None) -> SchedulerSpec:
    """Write a scheduler of diffusers as a table, and check that the table does what the scheduler does.

    Args:
        scheduler: Any scheduler that `SchedulerRegistry` covers; it is left as it is.
        num_inference_steps: What its `set_timesteps` is given. PNDM makes more model calls than that.
        added_noise_level: Timestep of PASD's second noising; see `SchedulerAdapter.noisings`.

    Raises:
        UnsupportedSchedulerError: Its class is unknown, it has options that no table expresses (all are named), or
            its steps are not those of its class.
        UsageError: The number of steps or the noise level is out of range.
    """
    adapter_class = require_expressible(scheduler)
    timed = copy.deepcopy(scheduler)
    try:
        timed.set_timesteps(num_inference_steps)
    except (ValueError, ZeroDivisionError, IndexError) as error:
        raise UsageError(
            f"{type(scheduler).__name__} makes no schedule of {num_inference_steps} steps: {error}",
            hint="choose another pipeline.num_inference_steps",
        ) from error
    if len(timed.timesteps) == 0:
        raise UsageError(f"{num_inference_steps} steps sample nothing", hint="choose 1 or more")
    exact = _in_float64(timed)
    spec = adapter_class(exact).spec(added_noise_level)
    _check_against(exact, spec)
    return spec


def noisings_of(scheduler: Any, *, added_noise_level: int | None = None) -> tuple[Noising, ...]:
    """The forward diffusion of a picture to where a scheduler begins; the same numbers as in its table.

    Args:
        scheduler: With its timesteps set; any class that `SchedulerRegistry` covers. It is left as it is.
        added_noise_level: Timestep of PASD's second noising; see `SchedulerAdapter.noisings`.

    Raises:
        UnsupportedSchedulerError: Its class is unknown.
        UsageError: The noise level is out of range.
    """
    return SchedulerRegistry.lookup(type(scheduler))(_in_float64(scheduler)).noisings(added_noise_level)


def require_expressible(scheduler: Any) -> type[SchedulerAdapter]:
    """Find what covers a scheduler, and check its options: for any number of steps, before any work.

    Raises:
        UnsupportedSchedulerError: Its class is unknown, or it has options that no table expresses; all are named.
    """
    adapter_class = SchedulerRegistry.lookup(type(scheduler))
    config = scheduler.config
    refused = [
        f"{option}={config[option]!r} (supported: {', '.join(map(repr, values))})"
        for option, values in adapter_class.expressible.items()
        if config.get(option, values[0]) not in values
    ]
    if refused:
        raise UnsupportedSchedulerError(
            f"no table of coefficients expresses {type(scheduler).__name__} with {'; '.join(refused)}",
            hint="change scheduler_config.json, or choose another scheduler; "
            f"supported are {', '.join(sorted(cls.__name__ for cls in SchedulerRegistry.entries()))}",
        )
    return adapter_class


def _in_float64(scheduler: Any) -> Any:
    """A copy whose tables are float64, so that what differs from ours is the method, not the rounding."""
    exact = copy.deepcopy(scheduler)
    for name, content in vars(exact).items():
        if isinstance(content, Tensor) and content.dtype == torch.float32:
            setattr(exact, name, content.double())
    return exact


def _check_against(scheduler: Any, spec: SchedulerSpec) -> None:
    """Run both on the same random answers of a model: a subclass or a later diffusers may step differently."""
    scheduler = copy.deepcopy(scheduler)
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)

    theirs = draw()
    run = Replay(spec, theirs)
    for index, (timestep, step) in enumerate(zip(scheduler.timesteps, spec.steps, strict=True)):
        given, answer = scheduler.scale_model_input(theirs, timestep), draw()
        _compare(scheduler, index, "gives the model", run.model_input, given, float(given.abs().max()))
        theirs = scheduler.step(answer, timestep, theirs, return_dict=False)[0]
        sizes = {name: content.abs() for name, content in {**run.values, OUTPUT: answer}.items()}
        size = combine({name: abs(number) for name, number in step.update[SAMPLE].items()}, sizes)
        run.advance(answer)
        _compare(scheduler, index, "makes", run.sample, theirs, float(size.max()))


def _compare(scheduler: Any, index: int, what: str, ours: Tensor, theirs: Tensor, size: float) -> None:
    name = type(scheduler).__name__
    if not theirs.isfinite().all():
        raise UnsupportedSchedulerError(
            f"{name} divides by zero in step {index}: its own result there is not finite",
            hint="choose another number of steps, timestep_spacing, solver_type or final_sigmas_type",
        )
    difference = float((ours - theirs).abs().max())
    if difference > _TOLERANCE * max(1.0, size):
        raise UnsupportedSchedulerError(
            f"{name} {what} something else in step {index} than its table: they differ by {difference:.3g} where the "
            f"terms reach {size:.3g}",
            hint="it has steps or options of its own: register an adapter for its class with "
            f"`{SchedulerRegistry.line(type(scheduler))}`, or choose another scheduler",
        )
