"""The whole sampler: against a loop written by hand, with other backends, in tiles, and asked for the impossible."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor
from torch.nn import functional

from sdconvert.errors import CheckpointError, MissingModelError, UsageError
from sdconvert.pipelines.color import wavelet_color_fix
from sdconvert.pipelines.pasd import PASDPipeline

SETTINGS: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 3}
NETWORKS = ("unet", "controlnet", "vae_encoder", "vae_decoder")


class Recorder:
    """A backend that is the original and remembers its calls."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.module(*args, **kwargs)


class Witness:
    """An observer that keeps everything."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any], tuple[int, str, int]]] = []

    def record(self, component: str, inputs: dict[str, Any], *, step: int, side: str, tile: int) -> None:
        self.seen.append((component, inputs, (step, side, tile)))


def by_hand(
    pipe: PASDPipeline, image: Tensor, scheduler: Any, guidance: float, negative: str, noise_level: int | None
) -> tuple[Tensor, Tensor]:
    """PASD's sampler as one would write it with diffusers, both sides in one batch."""
    generator = torch.Generator().manual_seed(5)
    control = functional.interpolate(image[None], scale_factor=4, mode="bicubic", antialias=True).clamp(0, 1)
    tokens = pipe.tokenizer([negative, "a cat"], padding="max_length", max_length=16, return_tensors="pt")
    text = pipe.text_encoder(tokens.input_ids).last_hidden_state
    latents = pipe.vae.encode(2 * control - 1).latent_dist.sample(generator) * pipe.vae.config.scaling_factor
    scheduler.set_timesteps(3)
    levels = [int(scheduler.timesteps[0])] + ([] if noise_level is None else [noise_level])
    for level in levels:
        noise = torch.randn(latents.shape, generator=generator)
        forward = DDIMScheduler.from_config(scheduler.config)
        latents = forward.add_noise(latents, noise, torch.tensor([level]))
    for timestep in scheduler.timesteps:
        sample = scheduler.scale_model_input(latents, timestep).repeat(2, 1, 1, 1)
        _, down, mid = pipe.controlnet(
            sample,
            timestep,
            encoder_hidden_states=text,
            controlnet_cond=control.repeat(2, 1, 1, 1),
            conditioning_scale=0.8,
            return_dict=False,
        )
        nega, posi = pipe.unet(
            sample,
            timestep,
            encoder_hidden_states=text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0].chunk(2)
        latents = scheduler.step(nega + guidance * (posi - nega), timestep, latents).prev_sample
    return latents, (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)[0]


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, UniPCMultistepScheduler, PNDMScheduler])
@pytest.mark.parametrize(("guidance", "noise_level"), [(1.0, None), (3.0, 900)])
def test_the_sampler_equals_a_loop_written_by_hand(
    pipe: PASDPipeline, image: Tensor, no_grad: None, scheduler_class: Any, guidance: float, noise_level: int | None
) -> None:
    pipe.scheduler = scheduler_class.from_config({**pipe.scheduler.config, "skip_prk_steps": True})
    negative = "dots" if guidance > 1 else None
    steps: list[Tensor] = []
    result = pipe(
        image,
        **SETTINGS,
        negative_prompt=negative,
        guidance_scale=guidance,
        conditioning_scale=0.8,
        seed=5,
        added_noise_level=noise_level,
        callback=lambda index, timestep, latents: steps.append(latents),
    )
    scheduler = scheduler_class.from_config(pipe.scheduler.config)
    latents, expected = by_hand(pipe, image, scheduler, guidance, negative or "", noise_level)
    assert len(steps) == len(scheduler.timesteps)
    torch.testing.assert_close(steps[-1], latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert result.shape == (3, 32, 48)
    assert float(result.std()) > 0.0


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_picture(pipe: PASDPipeline, image: Tensor) -> None:
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)  # it keeps state between steps
    first = pipe(image, **SETTINGS, seed=1)
    assert torch.equal(first, pipe(image, **SETTINGS, seed=1))
    assert not torch.equal(first, pipe(image, **SETTINGS, seed=2))


def test_a_run_neither_reads_nor_moves_the_global_random_state(pipe: PASDPipeline, image: Tensor) -> None:
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    state = torch.get_rng_state()
    pipe(image, **SETTINGS)
    assert torch.equal(state, torch.get_rng_state())


def test_guidance_between_equal_prompts_changes_nothing(pipe: PASDPipeline, image: Tensor) -> None:
    plain = pipe(image, **SETTINGS)
    torch.testing.assert_close(
        pipe(image, **SETTINGS, guidance_scale=5.0, negative_prompt="a cat"), plain, atol=1e-5, rtol=0
    )
    assert not torch.allclose(pipe(image, **SETTINGS, guidance_scale=5.0), plain, atol=1e-4)


def test_guidance_is_the_negative_plus_scale_times_the_difference(pipe: PASDPipeline) -> None:
    pipe.model_fn = lambda value, side: torch.tensor(value)
    shared = {"cfg_scale": 3.0, "unrelated": 0}
    assert pipe.guided_prediction(shared, {"value": 2.0}, {"value": 1.5}) == 3.0
    assert pipe.guided_prediction({"cfg_scale": 1.0}, {"value": 2.0}, {}) == 2.0


def test_backends_are_swapped_by_attribute_and_called_as_documented(pipe: PASDPipeline, image: Tensor) -> None:
    expected = pipe(image, **SETTINGS, guidance_scale=2.0, latent_tile=8, conditioning_scale=0.7)
    for name in NETWORKS:
        setattr(pipe, name, Recorder(getattr(pipe, name)))
    result = pipe(image, **SETTINGS, guidance_scale=2.0, latent_tile=8, conditioning_scale=0.7)
    assert torch.equal(result, expected)
    assert len(pipe.unet.calls) == len(pipe.controlnet.calls) == 3 * 2 * 2  # steps, sides, tiles
    for (sample, timestep), keywords in pipe.controlnet.calls:
        assert sample.shape == (1, 4, 8, 8)
        assert timestep.shape == (1,)
        assert keywords.pop("controlnet_cond").shape == (1, 3, 32, 32)
        assert keywords.pop("encoder_hidden_states").shape == (1, 16, 32)
        assert keywords == {"conditioning_scale": 0.7, "return_dict": False}
    for (sample, timestep), keywords in pipe.unet.calls:
        assert sample.shape == (1, 4, 8, 8)
        assert timestep.shape == (1,)
        assert len(keywords.pop("down_block_additional_residuals")) == 8
        assert keywords.pop("mid_block_additional_residual").shape == (1, 32, 1, 1)
        assert keywords.pop("encoder_hidden_states").shape == (1, 16, 32)
        assert keywords == {"return_dict": False}
    assert [latents.shape for (latents,), _ in pipe.vae_decoder.calls] == [(1, 4, 8, 8)] * 2
    assert [sample.shape for (sample,), _ in pipe.vae_encoder.calls] == [(1, 3, 32, 32)] * 2


def test_the_observer_sees_exactly_what_every_call_gets(pipe: PASDPipeline, image: Tensor) -> None:
    for name in NETWORKS:
        setattr(pipe, name, Recorder(getattr(pipe, name)))
    witness = Witness()
    result = pipe(image, **SETTINGS, guidance_scale=2.0, latent_tile=8, observer=witness)
    assert torch.equal(result, pipe(image, **SETTINGS, guidance_scale=2.0, latent_tile=8))
    for name in NETWORKS:
        seen = [inputs for component, inputs, _ in witness.seen if component == name]
        for inputs, (args, keywords) in zip(seen, getattr(pipe, name).calls, strict=False):
            given = [*args, *(value for key, value in keywords.items() if key != "return_dict")]
            assert len(inputs) == len(given)
            assert all(value is other for value, other in zip(inputs.values(), given, strict=True))
    where = [place for component, _, place in witness.seen if component == "unet"]
    assert where == [(step, side, tile) for step in range(3) for side in ("positive", "negative") for tile in (0, 1)]
    for name, step in (("vae_encoder", 0), ("vae_decoder", 3)):
        tiles = [place for component, _, place in witness.seen if component == name]
        assert tiles == [(step, "positive", 0), (step, "positive", 1)]


def test_with_local_networks_tiles_give_what_the_whole_picture_gives(pipe: PASDPipeline, image: Tensor) -> None:
    def controlnet(sample: Tensor, timestep: Tensor, *, controlnet_cond: Tensor, **_: Any) -> Any:
        return None, [functional.avg_pool2d(controlnet_cond, 4).mean(1, keepdim=True)], sample.mean(1, keepdim=True)

    def unet(sample: Tensor, timestep: Tensor, **keywords: Any) -> Any:
        (down,), mid = keywords["down_block_additional_residuals"], keywords["mid_block_additional_residual"]
        return (sample.sin() + down - mid,)

    pipe.controlnet, pipe.unet = controlnet, unet
    pipe.vae_encoder = lambda sample: functional.avg_pool2d(sample, 4).mean(1, keepdim=True).expand(-1, 8, -1, -1)
    pipe.vae_decoder = lambda latents: functional.interpolate(latents[:, :3], scale_factor=4).tanh()
    whole = pipe(image, **SETTINGS)
    for tile, overlap in ((8, None), (5, 3), (4, 0)):
        tiled = pipe(image, **SETTINGS, latent_tile=tile, latent_overlap=overlap)
        torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=0)


def test_a_picture_smaller_than_a_tile_is_padded_and_cut(pipe: PASDPipeline, image: Tensor) -> None:
    pipe.unet = Recorder(pipe.unet)
    result = pipe(image[:, :3, :5], **SETTINGS, latent_tile=8)
    assert result.shape == (3, 12, 20)
    assert {args[0].shape for args, _ in pipe.unet.calls} == {(1, 4, 8, 8)}


def test_the_colour_fix_is_pasds_on_the_result(pipe: PASDPipeline, image: Tensor) -> None:
    plain, fixed = pipe(image, **SETTINGS), pipe(image, **SETTINGS, color_fix=True)
    upsampled = functional.interpolate(image[None], scale_factor=4, mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(fixed, wavelet_color_fix(plain[None], upsampled)[0])


@pytest.mark.parametrize("name", ["controlnet", "unet", "vae_encoder", "vae_decoder", "text_encoder"])
def test_d5_a_missing_model_is_found_before_anything_is_computed(pipe: PASDPipeline, image: Tensor, name: str) -> None:
    recorders = {other: Recorder(getattr(pipe, other)) for other in ("text_encoder", "unet", "vae_decoder")}
    for other, recorder in recorders.items():
        setattr(pipe, other, recorder)
    setattr(pipe, name, None)
    with pytest.raises(MissingModelError, match=f"needs '{name}', which is not loaded"):
        pipe(image, **SETTINGS)
    assert not any(recorder.calls for recorder in recorders.values())


def test_only_the_named_models_are_brought_to_the_device(pasd_folder: Path) -> None:
    pipe = PASDPipeline.from_pretrained(pasd_folder, device="meta")
    pipe.load_models_to_device(["unet", "vae_decoder"])
    where = {name: next(getattr(pipe, name).parameters()).device.type for name in ("unet", "vae", "controlnet")}
    assert where == {"unet": "meta", "vae": "meta", "controlnet": "cpu"}
    pipe.controlnet = lambda *_, **__: None
    pipe.load_models_to_device(["controlnet"])  # another backend has no device to be brought to


def test_an_unknown_model_name_is_an_error_with_the_nearest(pipe: PASDPipeline) -> None:
    with pytest.raises(MissingModelError, match=r"no model 'vae_decode'.*\n.*'vae_decoder'"):
        pipe.load_models_to_device(["vae_decode"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"negative_prompt": "dots"}, "no effect without guidance"),
        ({"guidance_scale": 0.5}, "below 1"),
        ({"num_inference_steps": 0}, "samples nothing"),
        ({"added_noise_level": 1000}, "no timestep"),
        ({"latent_overlap": 4}, "no effect without tiles"),
    ],
)
def test_a_request_out_of_range_or_without_effect_is_refused(
    pipe: PASDPipeline, image: Tensor, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        pipe(image, **{**SETTINGS, **arguments})


def test_an_unknown_argument_is_refused_by_name(pipe: PASDPipeline, image: Tensor) -> None:
    with pytest.raises(TypeError, match="latent_tiles"):
        pipe(image, **SETTINGS, latent_tiles=8)


def test_a_prompt_that_is_too_long_warns(pipe: PASDPipeline, image: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sdconvert"):
        pipe(image, **{**SETTINGS, "prompt": "cat " * 20})
    assert "reads the first 16" in caplog.text


def test_a_controlnet_for_another_vae_is_refused(pipe: PASDPipeline) -> None:
    with torch.device("meta"):
        controlnet = ControlNetModel(conditioning_embedding_out_channels=(16, 32, 96, 256))
    with pytest.raises(CheckpointError, match="by 8, the VAE by 4"):
        PASDPipeline(
            unet=pipe.unet,
            controlnet=controlnet,
            vae=pipe.vae,
            text_encoder=pipe.text_encoder,
            tokenizer=pipe.tokenizer,
            scheduler=pipe.scheduler,
        )


def test_models_are_read_in_float32_for_evaluation(pipe: PASDPipeline) -> None:
    for model in (pipe.unet, pipe.controlnet, pipe.vae, pipe.text_encoder):
        assert not model.training
        assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in model.parameters())
