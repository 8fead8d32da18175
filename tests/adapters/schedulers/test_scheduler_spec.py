"""The table as a document: it is read back bit for bit, and what is no table is refused."""

import json
import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from sdconvert.adapters.schedulers import Replay, SchedulerSpec, SchedulerStep, replay, scheduler_spec, start_from
from sdconvert.adapters.schedulers.combination import Combination
from sdconvert.errors import UsageError

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
TERMS = st.dictionaries(st.sampled_from("abc"), st.floats(-1e6, 1e6), min_size=1)


@pytest.fixture(scope="module")
def spec() -> SchedulerSpec:
    return scheduler_spec(UniPCMultistepScheduler(**STABLE_DIFFUSION), 20, added_noise_level=900)


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_json_round_trip_is_exact(steps: int) -> None:
    spec = scheduler_spec(PNDMScheduler(**STABLE_DIFFUSION, skip_prk_steps=True), steps)
    assert SchedulerSpec.from_json(spec.to_json()) == spec
    assert SchedulerSpec.from_json(json.dumps(json.loads(spec.to_json()))) == spec, "a plain JSON library keeps it too"


@settings(max_examples=50, deadline=None)
@given(sample=NUMBERS, output=NUMBERS, scale=NUMBERS, timestep=NUMBERS)
def test_any_finite_number_survives_json(sample: float, output: float, scale: float, timestep: float) -> None:
    step = SchedulerStep(timestep=timestep, input_scale=scale, update={"sample": {"sample": sample, "output": output}})
    spec = SchedulerSpec(scheduler="S", prediction_type="epsilon", init_noise_sigma=1.0, noisings=(), steps=(step,))
    assert SchedulerSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"steps": []}, "steps"),
        ({"more": 1}, "more"),
        ({"init_noise_sigma": "1"}, "init_noise_sigma"),
        ({"steps": [{"timestep": 1, "input_scale": 1, "update": {}}]}, "steps.0.update"),
        ({"steps": [{"timestep": 1, "input_scale": 1, "update": {"sample": {"old": 1}}}]}, "step 0 reads old"),
        ({"steps": [{"timestep": 1, "input_scale": 1, "update": {"other": {"sample": 1}}}]}, "makes no sample"),
        ({"steps": [{"timestep": 1, "input_scale": 1, "update": {"sample": {}}}]}, "makes sample of nothing"),
    ],
)
def test_what_is_no_table_is_refused(spec: SchedulerSpec, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"table is not valid: .*{message}"):
        SchedulerSpec.from_json(json.dumps({**json.loads(spec.to_json()), **change}))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"scheduler": NaN}'])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="table is not valid"):
        SchedulerSpec.from_json(text)


def test_added_noise_is_that_of_the_training_schedule(spec: SchedulerSpec) -> None:
    """Timestep 900 is not among the 20 of the run, where `UniPCMultistepScheduler.add_noise` takes the last one."""
    scheduler = UniPCMultistepScheduler(**STABLE_DIFFUSION)
    scheduler.set_timesteps(20)
    assert 900 not in spec.timesteps
    added = spec.noisings[1]
    assert (round(added.signal, 4), round(added.noise, 4)) == (0.1190, 0.9929)
    one, zero = torch.ones(1), torch.zeros(1)
    theirs = float(scheduler.add_noise(one, zero, torch.tensor([900])))
    if theirs != pytest.approx(added.signal, abs=1e-4):  # diffusers may mend it; then the two agree
        last = float(scheduler.add_noise(one, zero, scheduler.timesteps[-1:]))
        assert theirs == last, "the trap: what was asked for has no effect"


@pytest.mark.parametrize("level", [-1, 1000])
def test_a_noise_level_outside_the_training_schedule_is_refused(level: int) -> None:
    with pytest.raises(UsageError, match=f"noise level {level} is no timestep"):
        scheduler_spec(UniPCMultistepScheduler(**STABLE_DIFFUSION), 4, added_noise_level=level)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_picture_starts_at_the_first_timestep(spacing: str) -> None:
    """As the schedulers' own `add_noise` has it at a timestep that is in the schedule."""
    latents, noise = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for scheduler in (
        DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False, timestep_spacing=spacing),
        UniPCMultistepScheduler(**STABLE_DIFFUSION, timestep_spacing=spacing),
        EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing=spacing),
    ):
        spec = scheduler_spec(scheduler, 5)
        scheduler.set_timesteps(5)
        expected = scheduler.add_noise(latents, noise, scheduler.timesteps[:1])
        torch.testing.assert_close(start_from(spec.noisings, latents, [noise]), expected, rtol=1e-5, atol=1e-5)


def test_noises_must_be_as_many_as_noisings(spec: SchedulerSpec) -> None:
    with pytest.raises(UsageError, match="1 noises for 2 noisings"):
        start_from(spec.noisings, torch.zeros(1), [torch.zeros(1)])


def test_a_replay_goes_step_by_step(spec: SchedulerSpec) -> None:
    latents = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    run, timesteps = Replay(spec, latents), []
    while (step := run.next_step) is not None:
        timesteps.append(step.timestep)
        run.advance(torch.tanh(run.model_input))
    assert tuple(timesteps) == spec.timesteps
    assert torch.equal(run.sample, replay(spec, lambda sample, _: torch.tanh(sample), latents))
    with pytest.raises(UsageError, match="all 20 steps are done"):
        run.advance(latents)


def evaluate(combination: Combination, values: dict[str, float]) -> float:
    return math.fsum(coefficient * values[name] for name, coefficient in combination.terms.items())


@given(left=TERMS, right=TERMS, factor=st.floats(-1e3, 1e3))
def test_combinations_calculate_as_the_numbers_they_stand_for(
    left: dict[str, float], right: dict[str, float], factor: float
) -> None:
    values = {"a": 0.5, "b": -2.0, "c": 3.0}
    one, two = Combination(left), Combination(right)
    first, second = evaluate(one, values), evaluate(two, values)
    assert evaluate(one + two, values) == pytest.approx(first + second, rel=1e-9, abs=1e-6)
    assert evaluate(one - two, values) == pytest.approx(first - second, rel=1e-9, abs=1e-6)
    assert evaluate(factor * one, values) == pytest.approx(factor * first, rel=1e-9, abs=1e-5)
    assert evaluate(one / 4.0, values) == pytest.approx(first / 4.0, rel=1e-9, abs=1e-6)
