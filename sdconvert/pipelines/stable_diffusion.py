"""Stable Diffusion 1 and 2, text to picture, with an optional ControlNet."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdconvert.errors import UsageError
from sdconvert.pipelines.base import Observer
from sdconvert.pipelines.latent_diffusion import LatentDiffusionPipeline
from sdconvert.pipelines.latent_units import (
    ControlImagePreprocessor,
    Decoder,
    InitialNoise,
    SizeChecker,
    check_image,
)
from sdconvert.pipelines.loop import Side
from sdconvert.pipelines.prompt_units import PromptEmbedder, guided_sides
from sdconvert.pipelines.shape import SamplingShape
from sdconvert.pipelines.unit import Inputs


def predict_noise(
    unet: Any,
    controlnet: Any,
    latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    sampling_shape: SamplingShape,
    *,
    control_image: Tensor | None,
    conditioning_scale: float,
    observe: Callable[[str, Inputs, int], None],
    added: Inputs | None = None,
) -> Tensor:
    """Prediction (1, C, h, w) of one side at one step: ControlNet and UNet per tile, then the weighted mean.

    Args:
        unet: UNet, or its backend.
        controlnet: ControlNet, or its backend; called only with a `control_image`.
        latents: (1, C, h, w).
        timestep: (1,).
        prompt_embeds: (1, tokens, channels).
        sampling_shape: Its grid cuts the tiles.
        control_image: (1, 3, H, W) in [0, 1], or None.
        conditioning_scale: Weight of the ControlNet's residuals.
        observe: Sees every call: component, inputs by name, tile.
        added: Keyword arguments that both models get besides.
    """
    grid = sampling_shape.grid
    added = added or {}

    def predict(tile: int) -> Tensor:
        sample = {"sample": grid.crop(latents, tile), "timestep": timestep}
        conditions: Inputs = {"encoder_hidden_states": prompt_embeds, **added}
        if control_image is not None:
            control = {
                "encoder_hidden_states": prompt_embeds,
                "controlnet_cond": grid.crop(control_image, tile, control_image.shape[-1] // latents.shape[-1]),
                "conditioning_scale": conditioning_scale,
                **added,
            }
            observe("controlnet", {**sample, **control}, tile)
            *_, down, mid = controlnet(*sample.values(), **control, return_dict=False)
            conditions |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        observe("unet", {**sample, **conditions}, tile)
        prediction: Tensor = unet(*sample.values(), **conditions, return_dict=False)[0]
        return prediction

    return grid.blend(map(predict, range(len(grid.corners))))


def observing(observer: Observer | None, progress_id: int, side: Side) -> Callable[[str, Inputs, int], None]:
    """What tells `observer`, if there is one, of a call: component, inputs by name, tile."""

    def observe(component: str, inputs: Inputs, tile: int) -> None:
        if observer is not None:
            observer.record(component, inputs, step=progress_id, side=side, tile=tile)

    return observe


def model_fn_stable_diffusion(
    unet: Any,
    latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    sampling_shape: SamplingShape,
    progress_id: int,
    side: Side,
    controlnet: Any = None,
    control_image: Tensor | None = None,
    conditioning_scale: float = 1.0,
    observer: Observer | None = None,
) -> Tensor:
    """Prediction of one side at one step; see `predict_noise`."""
    return predict_noise(
        unet,
        controlnet,
        latents,
        timestep,
        prompt_embeds,
        sampling_shape,
        control_image=control_image,
        conditioning_scale=conditioning_scale,
        observe=observing(observer, progress_id, side),
    )


class StableDiffusionPipeline(LatentDiffusionPipeline):
    """Makes a picture from text with Stable Diffusion 1 or 2, whatever the scheduler's `prediction_type`.

    Attributes that take another backend, each called with batch 1:

    * `unet(sample, timestep, encoder_hidden_states=…, return_dict=False)` returns a tuple that begins with the
      prediction; with a control image it also gets `down_block_additional_residuals` and
      `mid_block_additional_residual`;
    * `controlnet(sample, timestep, encoder_hidden_states=…, controlnet_cond=…, conditioning_scale=…,
      return_dict=False)` returns a tuple that ends with the down residuals and the mid residual;
    * `vae_decoder(latents)` returns the picture in [-1, 1] for unscaled latents.

    Args:
        unet: UNet.
        vae: Autoencoder; its decoder becomes `vae_decoder`.
        text_encoder: CLIP text encoder; None where embeddings are given to every run.
        tokenizer: Its tokenizer.
        scheduler: Sampler; every run works on a copy.
        controlnet: Only for runs with a control image.
        device: Where models run.
        torch_dtype: Type of the intermediate tensors.
    """

    unit_classes = (SizeChecker, PromptEmbedder, ControlImagePreprocessor, InitialNoise)
    post_unit_classes = (Decoder,)
    in_iteration_models = ("unet", "controlnet")
    iteration_triggers = {"controlnet": "control_image"}  # noqa: RUF012
    model_fn = staticmethod(model_fn_stable_diffusion)

    def __init__(
        self,
        *,
        unet: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        controlnet: Any = None,
        device: str | torch.device = "cpu",
        torch_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(vae=vae, scheduler=scheduler, device=device, torch_dtype=torch_dtype)
        self.unet, self.controlnet = unet, controlnet
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.default_size = default_size(unet.config.sample_size, self.vae_scale_factor)

    def inputs(
        self,
        prompt: str | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | None = None,
        seed: int = 0,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        control_image: Tensor | None = None,
        conditioning_scale: float | None = None,
        latent_tile: int | None = None,
        latent_overlap: int | None = None,
    ) -> tuple[Inputs, Inputs, Inputs]:
        """Inputs of a run; defaults are diffusers'.

        Args:
            prompt: What the picture shows.
            height: Pixels of the result; None: the control image's, else what the model was trained for.
            width: Likewise.
            num_inference_steps: Sampling steps.
            guidance_scale: Classifier-free guidance, two runs per step; 1: none.
            negative_prompt: What the picture should not show; needs guidance.
            seed: Seed of all noise.
            latents: First noise (1, C, h, w) of unit variance, in place of what the seed gives.
            prompt_embeds: Embeddings (1, tokens, channels) in place of the prompt.
            negative_prompt_embeds: Likewise of the negative prompt.
            control_image: Picture (3, height, width) in [0, 1] for the ControlNet, which must then be loaded.
            conditioning_scale: Weight of the ControlNet's residuals, 1 if not given; needs a control image.
            latent_tile: Side of the latent tiles that the models see; None: the whole picture at once.
            latent_overlap: Overlap of the tiles in latents; None: 8, at most half a tile.

        Raises:
            UsageError: An argument is out of range, or would have no effect.
        """
        shared = self.common_inputs(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=seed,
            latent_tile=latent_tile,
            latent_overlap=latent_overlap,
        )
        shared |= control_inputs(control_image, conditioning_scale)
        default = self.default_size if control_image is None else control_image.shape[-2:]
        height, width = default[0] if height is None else height, default[1] if width is None else width
        posi, nega = guided_sides(
            {"prompt": prompt, "prompt_embeds": prompt_embeds},
            {"negative_prompt": negative_prompt, "prompt_embeds": negative_prompt_embeds},
            guidance_scale,
        )
        return {**shared, "height": height, "width": width, "latents": latents}, posi, nega


def default_size(sample_size: int | Sequence[int], factor: int) -> tuple[int, int]:
    """Height and width in pixels that a model was trained for, from its `sample_size` in latents."""
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return height * factor, width * factor


def control_inputs(control_image: Tensor | None, conditioning_scale: float | None) -> Inputs:
    """The shared inputs that belong to a ControlNet; none without a control image.

    Raises:
        UsageError: A scale without an image, or an image that is no picture.
    """
    if control_image is None:
        if conditioning_scale is not None:
            raise UsageError(
                f"conditioning_scale={conditioning_scale} has no effect without a control image",
                hint="give control_image too",
            )
        return {}
    check_image(control_image, "control image")
    return {
        "control_image": control_image,
        "conditioning_scale": 1.0 if conditioning_scale is None else conditioning_scale,
    }
