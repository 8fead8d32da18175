"""A sampler as a table: what a loop without any knowledge of samplers multiplies and adds after each model call.

    values = {"sample": latents}
    for step in spec.steps:
        values["output"] = model(step.input_scale * values["sample"], step.timestep)
        values = {name: sum(c * values[v] for v, c in terms.items()) for name, terms in step.update.items()}
    return values["sample"]

Every deterministic sampler without clipping is of this form. Multistep ones keep more than one value from step to
step: past predictions, a corrected sample, the sample that a repeated step starts from.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sdconvert.errors import UsageError

SAMPLE, OUTPUT = "sample", "output"
Array = TypeVar("Array", bound=Any)  # whatever has `*` and `+`: torch tensors, numpy arrays, Combination


class _Record(BaseModel):
    # In strict mode the text "1" is no number, and NaN no coefficient.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Noising(_Record):
    """One step of forward diffusion: `signal · latents + noise · ε`, with ε of unit variance."""

    signal: float
    noise: float


class SchedulerStep(_Record):
    """One model call and what follows it."""

    timestep: float
    """What the model is told; Euler's are no whole numbers."""
    input_scale: float
    """The model gets the sample times this."""
    update: dict[str, dict[str, float]] = Field(min_length=1)
    """New values by name, each as coefficients of the values before and of `output`; no other value lives on."""


class SchedulerSpec(_Record):
    """The table of one scheduler for one number of steps; see the module for how it is read."""

    schema_version: Literal[1] = 1
    scheduler: str
    """Class name in diffusers."""
    prediction_type: str
    """What the model predicts; the coefficients contain it already."""
    init_noise_sigma: float
    """Standard deviation of a start from noise alone."""
    noisings: tuple[Noising, ...]
    """What clean latents go through, in order, each with noise of its own, where a picture is the start."""
    steps: tuple[SchedulerStep, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _values_exist(self) -> Self:
        known = {SAMPLE}
        for index, step in enumerate(self.steps):
            for name, terms in step.update.items():
                if loose := sorted(terms.keys() - known - {OUTPUT}):
                    raise ValueError(f"step {index} reads {', '.join(loose)} for {name}, which no step before wrote")
                if not terms:
                    raise ValueError(f"step {index} makes {name} of nothing")
            if SAMPLE not in step.update:
                raise ValueError(f"step {index} makes no {SAMPLE}")
            known = set(step.update)
        return self

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Of every model call, in order."""
        return tuple(step.timestep for step in self.steps)

    def to_json(self) -> str:
        """Return the table as JSON; its numbers are read back bit for bit."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what `to_json` wrote.

        Raises:
            UsageError: It is no such table, or of a version that this sdconvert does not read.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "as a whole"
            raise UsageError(
                f"the scheduler's table is not valid: {where}: {first['msg']}",
                hint="write it again: `sdconvert package`",
            ) from error


class Replay:
    """A run through a table, one model call at a time.

    Args:
        spec: The table.
        latents: Start of the sampler, of any array type.
    """

    def __init__(self, spec: SchedulerSpec, latents: Any) -> None:
        self._steps = spec.steps
        self._done = 0
        self._values = {SAMPLE: latents}

    @property
    def values(self) -> dict[str, Any]:
        """What lives on to the next step, by name."""
        return dict(self._values)

    @property
    def sample(self) -> Any:
        """Where the sampler is; after the last step, its result."""
        return self._values[SAMPLE]

    @property
    def next_step(self) -> SchedulerStep | None:
        """The step that the next `advance` does; None when all are done."""
        return self._steps[self._done] if self._done < len(self._steps) else None

    @property
    def model_input(self) -> Any:
        """What the model is given next."""
        return self._pending().input_scale * self.sample

    def advance(self, output: Any) -> None:
        """Take the model's answer to `model_input`.

        Raises:
            UsageError: All steps are done.
        """
        step, values = self._pending(), {**self._values, OUTPUT: output}
        self._values = {name: combine(terms, values) for name, terms in step.update.items()}
        self._done += 1

    def _pending(self) -> SchedulerStep:
        if self.next_step is None:
            raise UsageError(f"all {self._done} steps are done", hint="read `sample`")
        return self.next_step


def replay(spec: SchedulerSpec, model: Callable[[Array, float], Array], latents: Array) -> Array:
    """Sample with a table alone.

    Args:
        spec: The table.
        model: Called with its input and the timestep; returns its prediction in the same shape.
        latents: Start of the sampler, (…), a torch tensor or a numpy array.

    Returns:
        The result, of the shape and type of `latents`.
    """
    run = Replay(spec, latents)
    while (step := run.next_step) is not None:
        run.advance(model(run.model_input, step.timestep))
    result: Array = run.sample
    return result


def start_from(noisings: Sequence[Noising], latents: Array, noises: Sequence[Array]) -> Array:
    """Noise clean latents to where a sampler begins.

    Args:
        noisings: Of its table.
        latents: Clean latents, (…).
        noises: Unit noise of the same shape, one for each of `noisings`.

    Raises:
        UsageError: There are more or fewer noises than noisings.
    """
    if len(noises) != len(noisings):
        raise UsageError(f"{len(noises)} noises for {len(noisings)} noisings", hint="draw one for each")
    result: Any = latents
    for noising, noise in zip(noisings, noises, strict=True):
        result = noising.signal * result + noising.noise * noise
    noised: Array = result
    return noised


def combine(terms: Mapping[str, float], values: Mapping[str, Array]) -> Array:
    """`Σ coefficient · value`, of at least one term."""
    total: Any
    total, *others = (coefficient * values[name] for name, coefficient in terms.items())
    for term in others:
        total = total + term
    result: Array = total
    return result


def drop_unread(steps: Sequence[SchedulerStep]) -> tuple[SchedulerStep, ...]:
    """Leave out the values that no later step reads."""
    kept: list[SchedulerStep] = []
    read = {SAMPLE}
    for step in reversed(steps):
        update = {name: terms for name, terms in step.update.items() if name in read}
        kept.insert(0, step.model_copy(update={"update": update}))
        read = {SAMPLE, *(name for terms in update.values() for name in terms)}
    return tuple(kept)
