"""The units of PASD one by one: sizes, ranges, noise."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from torch import Tensor

from sdconvert.errors import UnsupportedSchedulerError, UsageError
from sdconvert.io.degradation import enlarge
from sdconvert.pipelines.pasd import PASDPipeline
from sdconvert.pipelines.pasd_units import (
    ControlImageEncoder,
    ImagePreprocessor,
    LatentsInitializer,
    ShapeChecker,
)
from sdconvert.pipelines.shape import sampling_shape


@pytest.mark.parametrize(
    ("height", "width", "tile", "requested", "processed", "tiles"),
    [
        (8, 12, None, (32, 48), (32, 48), 1),
        (8, 12, 8, (32, 48), (32, 48), 2),
        (3, 5, 8, (12, 20), (32, 32), 1),
        (9, 8, 8, (36, 32), (36, 32), 2),
    ],
)
def test_d12_both_sizes_are_recorded(
    pipe: PASDPipeline,
    height: int,
    width: int,
    tile: int | None,
    requested: tuple[int, int],
    processed: tuple[int, int],
    tiles: int,
) -> None:
    shape = pipe.sampling_shape(height, width, latent_tile=tile)
    assert (shape.requested, shape.processed, len(shape.grid.corners)) == (requested, processed, tiles)


def test_sizes_are_rounded_up_to_whole_latents() -> None:
    shape = sampling_shape(5, 7, upscale=3, factor=8, latent_tile=None, latent_overlap=None)
    assert shape.requested == (15, 21)
    assert shape.processed == (16, 24)
    assert (shape.grid.height, shape.grid.width) == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"upscale": 0}, "upscale=0"),
        ({"latent_overlap": 2}, "no effect without tiles"),
        ({"latent_tile": 0}, "latent_tile=0"),
        ({"latent_tile": 8, "latent_overlap": 8}, "cannot overlap"),
    ],
)
def test_impossible_sizes_are_refused(pipe: PASDPipeline, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipe.sampling_shape(8, 8, **arguments)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(1, 3, 8, 8),
        torch.zeros(4, 8, 8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.full((3, 8, 8), 1.01),
        torch.full((3, 8, 8), -0.01),
        torch.full((3, 8, 8), float("nan")),
        torch.zeros(3, 0, 8),
    ],
)
def test_what_is_no_picture_is_refused(pipe: PASDPipeline, image: Tensor) -> None:
    with pytest.raises(UsageError, match="the image"):
        ShapeChecker().process(pipe, image, 4)


def test_d12_a_short_side_below_768_warns_on_a_model_of_stable_diffusions_size(
    pipe: PASDPipeline, image: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
        )
    large = PASDPipeline(
        unet=unet,
        controlnet=pipe.controlnet,
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        scheduler=pipe.scheduler,
    )
    with caplog.at_level(logging.WARNING):
        ShapeChecker().process(pipe, image, 4)
        ShapeChecker().process(large, torch.zeros(3, 192, 200), 4)
        assert not caplog.records
        ShapeChecker().process(large, torch.zeros(3, 191, 400), 4)
    assert "a short side of 764 pixels" in caplog.text


def test_d12_the_control_image_is_in_0_1_and_the_init_image_in_minus_1_1(pipe: PASDPipeline) -> None:
    image = torch.zeros(3, 6, 6)
    image[:, 3:] = 1.0  # bicubic overshoots at the edge
    shape = pipe.sampling_shape(6, 6)
    upsampled = ImagePreprocessor().process(pipe, image, shape)["upsampled_image"]
    outputs = ControlImageEncoder().process(pipe, upsampled)
    for name, low in (("control_image", 0.0), ("init_image", -1.0)):
        assert outputs[name].aminmax() == (low, 1.0)


def test_the_enlargement_is_the_projects_bicubic_baseline_and_the_padding_repeats_its_border(
    pipe: PASDPipeline, image: Tensor
) -> None:
    shape = pipe.sampling_shape(*image.shape[1:], latent_tile=10)
    upsampled = ImagePreprocessor().process(pipe, image, shape)["upsampled_image"]
    assert upsampled.shape[-2:] == shape.processed == (40, 48)
    torch.testing.assert_close(upsampled[0, :, :32, :48], enlarge(image))
    assert torch.equal(upsampled[..., 32:, :], upsampled[..., 31:32, :].expand(-1, -1, 8, -1))


Start = Callable[..., tuple[Tensor, Tensor, Tensor]]


@pytest.fixture
def start(pipe: PASDPipeline, no_grad: None) -> Start:
    """What runs the unit with a scheduler: the clean latents, the noises, and the latents that it starts from."""

    def run(scheduler: Any, steps: int, level: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        scheduler.set_timesteps(steps)
        picture = 2 * torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
        posterior, *noises = torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        added = {} if level is None else {"added_noise": noises[1], "added_noise_level": level}
        shape = pipe.sampling_shape(32, 32, upscale=1)
        found = LatentsInitializer().process(pipe, picture, shape, posterior, noises[0], scheduler, **added)["latents"]
        encoded = pipe.vae.encode(picture).latent_dist
        return (encoded.mean + encoded.std * posterior) * pipe.scaling_factor, torch.stack(noises), found

    return run


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_sampling_starts_where_the_sampler_takes_the_latents_to_be(
    pipe: PASDPipeline, start: Start, scheduler_class: Any, spacing: str
) -> None:
    """Scaled by `init_noise_sigma`, Euler's would have 0.2 % too little of the picture in two of the spacings."""
    scheduler = scheduler_class.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    clean, (noise, _), found = start(scheduler, 5)
    torch.testing.assert_close(found, scheduler.add_noise(clean, noise, scheduler.timesteps[:1]), rtol=1e-5, atol=1e-5)


def test_a_noise_level_means_the_training_timestep_also_between_the_sampled_ones(
    pipe: PASDPipeline, start: Start
) -> None:
    reference = DDIMScheduler.from_config(pipe.scheduler.config)
    unipc = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    clean, noises, found = start(unipc, 20, 900)
    assert 900 not in unipc.timesteps
    expected = clean
    for noise, level in zip(noises, (int(unipc.timesteps[0]), 900), strict=True):
        expected = reference.add_noise(expected, noise, torch.tensor([level]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # What diffusers' UniPC does instead: the last entry of the schedule, where hardly any noise is left.
    assert not torch.allclose(unipc.add_noise(clean, noises[1], torch.tensor([900])), expected, atol=0.1)


def test_a_sampler_whose_start_nobody_knows_is_refused(pipe: PASDPipeline, image: Tensor) -> None:
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(UnsupportedSchedulerError, match="no scheduler covers EulerAncestralDiscreteScheduler; known:"):
        pipe(image, prompt="a cat", num_inference_steps=2)
