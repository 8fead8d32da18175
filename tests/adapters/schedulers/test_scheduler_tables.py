"""A table samples as the scheduler of diffusers does that it was made from."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdconvert.adapters.schedulers import SchedulerAdapter, SchedulerRegistry, replay, scheduler_spec
from sdconvert.errors import RegistrationError, UnsupportedSchedulerError, UsageError

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SPACINGS = st.sampled_from(["leading", "trailing", "linspace"])
PREDICTIONS = st.sampled_from(["epsilon", "sample", "v_prediction"])
FLAGS = st.booleans()
COMMON = {"prediction_type": PREDICTIONS, "timestep_spacing": SPACINGS, "steps_offset": st.sampled_from([0, 1])}
ORDERS = st.sampled_from([1, 2, 3])
OPTIONS: dict[type, dict[str, st.SearchStrategy[Any]]] = {
    DDIMScheduler: {**COMMON, "clip_sample": st.just(False), "set_alpha_to_one": FLAGS},
    EulerDiscreteScheduler: {
        **COMMON,
        "use_karras_sigmas": FLAGS,
        "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
    },
    PNDMScheduler: {
        **COMMON,
        "prediction_type": st.sampled_from(["epsilon", "v_prediction"]),
        "skip_prk_steps": FLAGS,
        "set_alpha_to_one": FLAGS,
    },
    DPMSolverMultistepScheduler: {
        **COMMON,
        "solver_order": ORDERS,
        "solver_type": st.sampled_from(["midpoint", "heun"]),
        "lower_order_final": FLAGS,
        "euler_at_final": FLAGS,
        "use_karras_sigmas": FLAGS,
        "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
    },
    UniPCMultistepScheduler: {
        **COMMON,
        "solver_order": ORDERS,
        "solver_type": st.sampled_from(["bh1", "bh2"]),
        "predict_x0": FLAGS,
        "lower_order_final": FLAGS,
        "disable_corrector": st.sampled_from([[], [0], [0, 2]]),
        "use_karras_sigmas": FLAGS,
        "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
    },
}


def model(sample: Any, timestep: float) -> Any:
    """Answers that depend on the sample, its neighbours and the time, and stay bounded; of any array type."""
    neighbours = np.roll(sample, 1, -1) if isinstance(sample, np.ndarray) else sample.roll(1, -1)
    return 0.5 * sample.clip(-3, 3) - 0.3 * neighbours.clip(-1, 1) + 0.1 * (float(timestep) / 500 - 1)


def sampled(scheduler: Any, steps: int, noise: Tensor) -> tuple[Tensor, float]:
    """The loop of diffusers' pipelines: its result, and the largest value on the way."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    sample = noise * scheduler.init_noise_sigma
    largest = float(sample.abs().max())
    for timestep in scheduler.timesteps:
        output = model(scheduler.scale_model_input(sample, timestep), timestep)
        try:
            sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
        except torch.linalg.LinAlgError:
            sample = torch.full_like(sample, torch.nan)
        largest = max(largest, float(sample.abs().max()))
    return sample, largest


def assert_parity(scheduler: Any, steps: int, seed: int = 0) -> None:
    noise = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(seed))
    expected, largest = sampled(scheduler, steps, noise)
    if not expected.isfinite().all():  # some options of diffusers divide by zero together
        with pytest.raises(UnsupportedSchedulerError, match="divides by zero"):
            scheduler_spec(scheduler, steps)
        return
    spec = scheduler_spec(scheduler, steps)
    found = replay(spec, model, noise * spec.init_noise_sigma)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, largest))


@pytest.mark.parametrize("scheduler_class", OPTIONS, ids=lambda cls: cls.__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), steps=st.integers(1, 20))
def test_a_table_samples_as_its_scheduler(scheduler_class: type, data: st.DataObject, steps: int) -> None:
    options = {name: data.draw(choice, label=name) for name, choice in OPTIONS[scheduler_class].items()}
    if scheduler_class is PNDMScheduler and not options["skip_prk_steps"]:
        steps = max(steps, 4)  # its Runge-Kutta start takes that many
    assert_parity(scheduler_class(**STABLE_DIFFUSION, **options), steps)


@pytest.mark.parametrize("steps", range(1, 21))
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            lambda: DDIMScheduler(
                **STABLE_DIFFUSION, clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing"
            ),
            id="pasd_tiny",
        ),
        pytest.param(lambda: UniPCMultistepScheduler(**STABLE_DIFFUSION), id="PASD"),
        pytest.param(
            lambda: PNDMScheduler(**STABLE_DIFFUSION, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
            id="Stable Diffusion 1.5",
        ),
        pytest.param(
            lambda: EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="leading", steps_offset=1), id="SDXL"
        ),
        pytest.param(DPMSolverMultistepScheduler, id="PixArt"),
    ],
)
def test_the_settings_of_released_models(make: Callable[[], Any], steps: int) -> None:
    assert_parity(make(), steps)


@pytest.mark.parametrize("option", ["use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"])
def test_every_spacing_of_noise_levels(option: str) -> None:
    assert_parity(DPMSolverMultistepScheduler(**STABLE_DIFFUSION, **{option: True}), 12)


def test_numpy_replays_as_torch_does() -> None:
    spec = scheduler_spec(UniPCMultistepScheduler(**STABLE_DIFFUSION), 8)
    latents = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    np.testing.assert_allclose(replay(spec, model, latents.numpy()), replay(spec, model, latents).numpy(), atol=1e-12)


def test_pndm_repeats_its_second_timestep() -> None:
    spec = scheduler_spec(PNDMScheduler(**STABLE_DIFFUSION, skip_prk_steps=True), 5)
    assert spec.timesteps == (800, 600, 600, 400, 200, 0)
    assert set(spec.steps[0].update) == {"sample", "held", "output_1"}
    assert "held" in spec.steps[1].update["sample"]
    assert "sample" not in spec.steps[1].update["sample"], "the repeated step starts where the first one did"


def test_only_what_is_read_again_lives_on() -> None:
    ddim = scheduler_spec(DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False), 4)
    assert [set(step.update) for step in ddim.steps] == [{"sample"}] * 4
    unipc = scheduler_spec(UniPCMultistepScheduler(**STABLE_DIFFUSION), 4)
    assert set(unipc.steps[-1].update) == {"sample"}


def test_the_scheduler_is_left_as_it_is() -> None:
    scheduler = UniPCMultistepScheduler(**STABLE_DIFFUSION)
    before = {name: repr(content) for name, content in vars(scheduler).items()}
    scheduler_spec(scheduler, 6)
    assert {name: repr(content) for name, content in vars(scheduler).items()} == before


def test_x3_an_unknown_scheduler_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedSchedulerError, match="no scheduler covers DDPMScheduler; known: DDIM.*UniPC") as e:
        scheduler_spec(DDPMScheduler(), 4)
    assert "@SchedulerRegistry.register(DDPMScheduler)" in e.value.hint


def test_options_that_no_table_expresses_are_all_named() -> None:
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", thresholding=True, solver_order=2)
    with pytest.raises(UnsupportedSchedulerError, match="algorithm_type='sde-dpmsolver\\+\\+'.*thresholding=True") as e:
        scheduler_spec(scheduler, 4)
    assert "'dpmsolver++', 'dpmsolver'" in str(e.value)
    assert "PNDMScheduler" in e.value.hint


@pytest.mark.parametrize(
    ("scheduler", "named"),
    [
        (DDIMScheduler(), "clip_sample=True"),
        (DDIMScheduler(clip_sample=False, thresholding=True), "thresholding=True"),
        (UniPCMultistepScheduler(solver_order=4), "solver_order=4"),
        (UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "use_flow_sigmas=True"),
        (DPMSolverMultistepScheduler(variance_type="learned_range"), "variance_type='learned_range'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_option_that_no_table_expresses_is_refused(scheduler: Any, named: str) -> None:
    with pytest.raises(UnsupportedSchedulerError, match=named):
        scheduler_spec(scheduler, 4)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        UniPCMultistepScheduler(predict_x0=False),
        UniPCMultistepScheduler(solver_order=3, lower_order_final=False),
        UniPCMultistepScheduler(solver_type="bh1"),
    ],
)
def test_a_division_by_zero_is_refused(scheduler: Any) -> None:
    """The scheduler itself gives NaN there, unseen until the picture is black."""
    noise = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    assert not sampled(scheduler, 4, noise)[0].isfinite().all()
    with pytest.raises(UnsupportedSchedulerError, match="divides by zero in step"):
        scheduler_spec(scheduler, 4)


@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_a_number_of_steps_that_makes_no_schedule_is_refused(steps: int) -> None:
    with pytest.raises(UsageError, match="steps"):
        scheduler_spec(DDIMScheduler(clip_sample=False), steps)


def test_a_subclass_with_steps_of_its_own_is_refused() -> None:
    class DampedScheduler(DDIMScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            sample, *others = super().step(*args, **kwargs)
            return (0.99 * sample, *others)

    with pytest.raises(UnsupportedSchedulerError, match="DampedScheduler makes something else in step 0") as error:
        scheduler_spec(DampedScheduler(clip_sample=False), 4)
    assert "@SchedulerRegistry.register(DampedScheduler)" in error.value.hint


def test_a_subclass_with_a_schedule_of_its_own_is_covered() -> None:
    class LateScheduler(DDIMScheduler):
        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
            super().set_timesteps(num_inference_steps, device)
            self.timesteps = self.timesteps // 2

    assert_parity(LateScheduler(**STABLE_DIFFUSION, clip_sample=False), 4)


def test_x2_only_a_scheduler_adapter_registers() -> None:
    with pytest.raises(RegistrationError, match="it is no SchedulerAdapter"):
        SchedulerRegistry.register(DDPMScheduler)(object)  # type: ignore[type-var, arg-type]


def test_x6_adapters_are_named_as_diffusers_names_class_and_file() -> None:
    for origin, adapter in SchedulerRegistry.entries().items():
        assert issubclass(adapter, SchedulerAdapter)
        assert adapter.__name__ == f"{origin.__name__}Adapter"
        assert adapter.__module__.rpartition(".")[2] == origin.__module__.rpartition(".")[2]
        assert (Path(__file__).parents[3] / f"{adapter.__module__.replace('.', '/')}.py").is_file()
