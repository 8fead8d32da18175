"""PASD super-resolution: the one sampler that calibration, evaluation, packaging and the report run.

What differs between them is the backend of `unet`, `controlnet` and `vae_decoder`: attributes of the pipeline, any
callable with the model's calling convention, fed with batch 1 and, with latent tiles, with one static shape.
"""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdconvert.errors import CheckpointError, UsageError
from sdconvert.models.pasd import load_pasd
from sdconvert.pipelines.base import BasePipeline, Observer, Side
from sdconvert.pipelines.loading import load_auxiliaries
from sdconvert.pipelines.pasd_units import (
    ColorFix,
    ControlImageEncoder,
    Decoder,
    ImagePreprocessor,
    LatentsInitializer,
    NoiseInitializer,
    PromptEmbedder,
    SamplingShape,
    ShapeChecker,
    sampling_shape,
)
from sdconvert.pipelines.unit import Inputs

Callback = Callable[[int, Tensor, Tensor], None]


class VAEDecoder(nn.Module):
    """The decoding half of an `AutoencoderKL` as a model of its own."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        """Picture (1, 3, H, W) in [-1, 1] of unscaled latents (1, C, h, w)."""
        picture: Tensor = self.vae.decode(latent_sample, return_dict=False)[0]
        return picture


class PASDPipeline(BasePipeline):
    """Super-resolution with PASD: a picture is enlarged, encoded, noised and sampled again under its own control.

    Attributes that take another backend, each called with batch 1:

    * `unet(sample, timestep, encoder_hidden_states=…, down_block_additional_residuals=…,
      mid_block_additional_residual=…, return_dict=False)` returns a tuple that begins with the prediction;
    * `controlnet(sample, timestep, encoder_hidden_states=…, controlnet_cond=…, conditioning_scale=…,
      return_dict=False)` returns a tuple that ends with the down residuals and the mid residual;
    * `vae_decoder(latents)` returns the picture in [-1, 1] for latents divided by the scaling factor.

    Args:
        unet: PASD UNet.
        controlnet: PASD ControlNet.
        vae: Autoencoder; its decoder becomes `vae_decoder`.
        text_encoder: CLIP text encoder.
        tokenizer: Its tokenizer.
        scheduler: Sampler; every run works on a copy.
        device: Where models run.
        torch_dtype: Type of the intermediate tensors.

    Raises:
        CheckpointError: The ControlNet reduces its image by another factor than the VAE.
    """

    def __init__(
        self,
        *,
        unet: Any,
        controlnet: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        device: str | torch.device = "cpu",
        torch_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(device, torch_dtype)
        self.unet, self.controlnet, self.vae = unet, controlnet, vae
        self.vae_decoder: Callable[[Tensor], Tensor] = VAEDecoder(vae)
        self.text_encoder, self.tokenizer, self.scheduler = text_encoder, tokenizer, scheduler
        # Facts of the checkpoint, taken while the models are the original ones: a backend has no config.
        self.vae_scale_factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_channels: int = vae.config.latent_channels
        self.scaling_factor: float = vae.config.scaling_factor
        self.stable_diffusion_size: bool = unet is not None and unet.config.block_out_channels[0] >= 320
        self._check_control_factor()
        self.units = (
            ShapeChecker(),
            ImagePreprocessor(),
            PromptEmbedder(),
            ControlImageEncoder(),
            NoiseInitializer(),
            LatentsInitializer(),
        )
        self.post_units = (Decoder(), ColorFix())
        self.in_iteration_models = ("unet", "controlnet")
        self.model_fn = model_fn_pasd

    def _check_control_factor(self) -> None:
        if self.controlnet is None:
            return
        control_factor = 2 ** (len(self.controlnet.config.conditioning_embedding_out_channels) - 1)
        if control_factor != self.vae_scale_factor:
            raise CheckpointError(
                f"the ControlNet reduces its image by {control_factor}, the VAE by {self.vae_scale_factor}",
                hint="conditioning_embedding_out_channels must be as long as the VAE's block_out_channels",
            )

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> "PASDPipeline":
        """Read a diffusers folder of PASD, from the disk only, in float32 and evaluation mode.

        Args:
            folder: Holds `unet`, `controlnet`, `vae`, `text_encoder`, `tokenizer` and `scheduler`.
            device: Where models run.

        Raises:
            CheckpointError: A part is missing or damaged, or its weights do not fit its config.
        """
        auxiliaries = load_auxiliaries(Path(folder))
        unet, controlnet = load_pasd(Path(folder))
        pipe = cls(unet=unet, controlnet=controlnet, **auxiliaries, device=device)
        for model in (unet, controlnet, pipe.vae, pipe.text_encoder):
            model.eval().requires_grad_(False)
        return pipe

    def sampling_shape(
        self,
        height: int,
        width: int,
        *,
        upscale: int = 4,
        latent_tile: int | None = None,
        latent_overlap: int | None = None,
    ) -> SamplingShape:
        """Sizes and tiles of a run on a low-resolution picture of `height` x `width`, as `__call__` will use them."""
        return sampling_shape(
            height,
            width,
            upscale=upscale,
            factor=self.vae_scale_factor,
            latent_tile=latent_tile,
            latent_overlap=latent_overlap,
        )

    @torch.no_grad()
    def __call__(
        self,
        image: Tensor,
        *,
        prompt: str,
        num_inference_steps: int,
        negative_prompt: str | None = None,
        guidance_scale: float = 1.0,
        conditioning_scale: float = 1.0,
        seed: int = 0,
        upscale: int = 4,
        latent_tile: int | None = None,
        latent_overlap: int | None = None,
        added_noise_level: int | None = None,
        color_fix: bool = False,
        observer: Observer | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Enlarge a picture; the same arguments give the same picture bit for bit.

        Args:
            image: Low-resolution RGB picture (3, h, w) in [0, 1].
            prompt: What the picture shows.
            num_inference_steps: Sampling steps.
            negative_prompt: What it should not show; needs guidance.
            guidance_scale: Classifier-free guidance, two runs per step; 1: none.
            conditioning_scale: Weight of the ControlNet's residuals.
            seed: Seed of all noise.
            upscale: Enlargement.
            latent_tile: Side of the latent tiles that the models see; None: the whole picture at once.
            latent_overlap: Overlap of the tiles in latents; None: 8, at most half a tile.
            added_noise_level: Timestep of PASD's second noising of the start (it uses 900); None: noised once.
            color_fix: Take the colours from the enlarged input, as PASD does. Off by default, because it replaces
                the low band of the result by one that no network computed: errors there would go unmeasured.
            observer: Sees every model call.
            callback: Called after each step with its index, timestep and latents.

        Returns:
            Picture (3, h·upscale, w·upscale) in [0, 1].

        Raises:
            UsageError: An argument is out of range, or would have no effect.
            MissingModelError: A model is not loaded.
        """
        self.require_models(name for unit in self.all_units for name in unit.onload_model_names)
        self.require_models(self.in_iteration_models)
        _check_request(num_inference_steps, guidance_scale, negative_prompt)
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(num_inference_steps, device=self.device)
        shared: Inputs = {
            "image": image,
            "upscale": upscale,
            "latent_tile": latent_tile,
            "latent_overlap": latent_overlap,
            "cfg_scale": guidance_scale,
            "conditioning_scale": conditioning_scale,
            "generator": torch.Generator().manual_seed(seed),
            "added_noise_level": added_noise_level,
            "scheduler": scheduler,
            "color_fix": color_fix,
            "observer": observer,
        }
        sides: tuple[Inputs, Inputs] = {"prompt": prompt}, {"negative_prompt": negative_prompt or ""}
        shared, posi, nega = self.run_units(self.units, shared, *sides)
        shared["latents"] = self._denoise(shared, posi, nega, callback)
        shared, *_ = self.run_units(self.post_units, shared, posi, nega)
        output: Tensor = shared["output_image"]
        return output[0]

    def _denoise(self, shared: Inputs, posi: Inputs, nega: Inputs, callback: Callback | None) -> Tensor:
        scheduler, latents = shared["scheduler"], shared["latents"]
        self.load_models_to_device(self.in_iteration_models)
        # A stochastic scheduler must draw from the run's own seed.
        seeded = "generator" in inspect.signature(scheduler.step).parameters
        noise = {"generator": shared["generator"]} if seeded else {}
        for progress_id, timestep in enumerate(scheduler.timesteps):
            sample = scheduler.scale_model_input(latents, timestep)
            prediction = self.guided_prediction(
                {**shared, "latents": sample}, posi, nega, timestep=timestep.reshape(1), progress_id=progress_id
            )
            latents = scheduler.step(prediction, timestep, latents, **noise, return_dict=False)[0]
            if callback is not None:
                callback(progress_id, timestep, latents)
        result: Tensor = latents
        return result


def _check_request(num_inference_steps: int, guidance_scale: float, negative_prompt: str | None) -> None:
    if num_inference_steps < 1:
        raise UsageError(f"num_inference_steps={num_inference_steps} samples nothing", hint="choose 1 or more")
    if guidance_scale < 1.0:
        raise UsageError(f"guidance_scale={guidance_scale} is below 1", hint="1 is no guidance; more guides")
    if negative_prompt is not None and guidance_scale == 1.0:
        raise UsageError(
            "negative_prompt has no effect without guidance", hint="give guidance_scale above 1, or no negative_prompt"
        )


def model_fn_pasd(
    unet: Any,
    controlnet: Any,
    latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    control_image: Tensor,
    conditioning_scale: float,
    sampling_shape: SamplingShape,
    progress_id: int,
    side: Side,
    observer: Observer | None = None,
) -> Tensor:
    """Prediction (1, C, h, w) of one side at one step: ControlNet and UNet per tile, then the weighted mean."""
    grid = sampling_shape.grid
    scale = control_image.shape[-1] // latents.shape[-1]

    def observe(component: str, inputs: Inputs, tile: int) -> None:
        if observer is not None:
            observer.record(component, inputs, step=progress_id, side=side, tile=tile)

    def predict(tile: int) -> Tensor:
        sample = {"sample": grid.crop(latents, tile), "timestep": timestep}
        conditions = {
            "encoder_hidden_states": prompt_embeds,
            "controlnet_cond": grid.crop(control_image, tile, scale),
            "conditioning_scale": conditioning_scale,
        }
        observe("controlnet", {**sample, **conditions}, tile)
        *_, down, mid = controlnet(*sample.values(), **conditions, return_dict=False)
        residuals = {
            "encoder_hidden_states": prompt_embeds,
            "down_block_additional_residuals": down,
            "mid_block_additional_residual": mid,
        }
        observe("unet", {**sample, **residuals}, tile)
        prediction: Tensor = unet(*sample.values(), **residuals, return_dict=False)[0]
        return prediction

    return grid.blend(map(predict, range(len(grid.corners))))
