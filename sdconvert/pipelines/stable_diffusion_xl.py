"""Stable Diffusion XL: two text encoders, and the sizes of the picture as further conditions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdconvert.errors import CheckpointError, UsageError
from sdconvert.pipelines.base import Observer
from sdconvert.pipelines.latent_diffusion import LatentDiffusionPipeline
from sdconvert.pipelines.latent_units import ControlImagePreprocessor, Decoder, InitialNoise, SizeChecker
from sdconvert.pipelines.loop import Side
from sdconvert.pipelines.prompt_units import DualPromptEmbedder, guided_sides
from sdconvert.pipelines.shape import SamplingShape
from sdconvert.pipelines.stable_diffusion import control_inputs, default_size, observing, predict_noise
from sdconvert.pipelines.unit import Inputs, PipelineUnit

Size = tuple[int, int]


class TimeIds(PipelineUnit):
    """Tells the model, per side, which size the picture had, how it was cropped and which size is wanted."""

    def __init__(self) -> None:
        keys = {key: key for key in ("original_size", "crops_coords_top_left", "target_size")}
        super().__init__(
            separate_cfg=True,
            input_params=("height", "width"),
            input_params_posi=keys,
            input_params_nega=keys,
            output_params=("time_ids",),
        )

    def process(
        self,
        pipe: "StableDiffusionXLPipeline",
        height: int,
        width: int,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
    ) -> Inputs:
        """Return `time_ids` (1, 6); sizes that are not given are those of the result."""
        size = (height, width)
        ids = (*(original_size or size), *crops_coords_top_left, *(target_size or size))
        return {"time_ids": torch.tensor([ids], device=pipe.device, dtype=pipe.torch_dtype)}


def model_fn_stable_diffusion_xl(
    unet: Any,
    latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    text_embeds: Tensor,
    time_ids: Tensor,
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
        added={"added_cond_kwargs": {"text_embeds": text_embeds, "time_ids": time_ids}},
    )


class StableDiffusionXLPipeline(LatentDiffusionPipeline):
    """Makes a picture from text with Stable Diffusion XL (base).

    Models are called as in `StableDiffusionPipeline`, and `unet` and `controlnet` get
    `added_cond_kwargs={"text_embeds": (1, projection), "time_ids": (1, 6)}` besides.

    Args:
        unet: UNet with the added conditions `text_time`.
        vae: Autoencoder; its decoder becomes `vae_decoder`.
        text_encoder: First CLIP text encoder; both None where embeddings are given to every run.
        text_encoder_2: Second, with projection.
        tokenizer: Tokenizer of the first.
        tokenizer_2: Tokenizer of the second.
        scheduler: Sampler; every run works on a copy.
        controlnet: Only for runs with a control image.
        force_zeros_for_empty_prompt: Without a negative prompt, the negative side gets zeros for embeddings.
        device: Where models run.
        torch_dtype: Type of the intermediate tensors.

    Raises:
        CheckpointError: The UNet does not take SDXL's added conditions.
    """

    unit_classes = (SizeChecker, DualPromptEmbedder, TimeIds, ControlImagePreprocessor, InitialNoise)
    post_unit_classes = (Decoder,)
    in_iteration_models = ("unet", "controlnet")
    iteration_triggers = {"controlnet": "control_image"}  # noqa: RUF012
    model_fn = staticmethod(model_fn_stable_diffusion_xl)

    def __init__(
        self,
        *,
        unet: Any,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        scheduler: Any,
        controlnet: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        device: str | torch.device = "cpu",
        torch_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(vae=vae, scheduler=scheduler, device=device, torch_dtype=torch_dtype)
        if unet.config.addition_embed_type != "text_time":
            raise CheckpointError(
                f"the UNet's addition_embed_type is {unet.config.addition_embed_type!r}, SDXL's is 'text_time'",
                hint="use StableDiffusionPipeline for Stable Diffusion 1 and 2",
            )
        self.unet, self.controlnet = unet, controlnet
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        self.tokenizer, self.tokenizer_2 = tokenizer, tokenizer_2
        self.latents_mean: Sequence[float] | None = vae.config.latents_mean
        self.latents_std: Sequence[float] | None = vae.config.latents_std
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        self.default_size = default_size(unet.config.sample_size, self.vae_scale_factor)

    def unscale_latents(self, latents: Tensor) -> Tensor:
        """See `LatentDiffusionPipeline.unscale_latents`; autoencoders tuned for SDXL may state mean and deviation."""
        if self.latents_mean is None or self.latents_std is None:
            return super().unscale_latents(latents)
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=latents.dtype)[:, None, None]
            for values in (self.latents_mean, self.latents_std)
        )
        return latents * std / self.scaling_factor + mean

    def inputs(
        self,
        prompt: str | None = None,
        *,
        prompt_2: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        negative_prompt: str | None = None,
        negative_prompt_2: str | None = None,
        seed: int = 0,
        latents: Tensor | None = None,
        embeds: Inputs | None = None,
        negative_embeds: Inputs | None = None,
        sizes: Inputs | None = None,
        negative_sizes: Inputs | None = None,
        control_image: Tensor | None = None,
        conditioning_scale: float | None = None,
        latent_tile: int | None = None,
        latent_overlap: int | None = None,
    ) -> tuple[Inputs, Inputs, Inputs]:
        """Inputs of a run; what is not listed here is as in `StableDiffusionPipeline.inputs`.

        Args:
            prompt: What the picture shows.
            prompt_2: For the second encoder; None: the same.
            height: Pixels of the result.
            width: Likewise.
            num_inference_steps: Sampling steps.
            guidance_scale: Classifier-free guidance; 1: none.
            negative_prompt: What it should not show; None: zeros for embeddings, or the empty prompt.
            negative_prompt_2: For the second encoder; None: the same.
            seed: Seed of all noise.
            latents: First noise in place of what the seed gives.
            embeds: `prompt_embeds` (1, tokens, channels) and `text_embeds` (1, projection) in place of prompts.
            negative_embeds: Likewise of the negative side.
            sizes: Any of `original_size`, `crops_coords_top_left`, `target_size`, each (height, width) or (top, left).
            negative_sizes: Likewise of the negative side; None: as `sizes`.
            control_image: Picture (3, height, width) in [0, 1] for the ControlNet.
            conditioning_scale: Weight of the ControlNet's residuals.
            latent_tile: Side of the latent tiles.
            latent_overlap: Overlap of the tiles.

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
        shared |= {
            "height": default[0] if height is None else height,
            "width": default[1] if width is None else width,
            "latents": latents,
        }
        posi, nega = guided_sides(
            {"prompt": prompt, "prompt_2": prompt_2, **(embeds or {})},
            {"negative_prompt": negative_prompt, "negative_prompt_2": negative_prompt_2, **(negative_embeds or {})},
            guidance_scale,
            embeds=("prompt_embeds", "text_embeds"),
        )
        if guidance_scale == 1.0:
            if negative_sizes is not None:
                raise UsageError("negative_sizes has no effect without guidance", hint="give guidance_scale above 1")
            return shared, {**posi, **_checked(sizes)}, {}
        asked = any(value is not None for value in (negative_prompt, negative_prompt_2, negative_embeds))
        zeros = self.force_zeros_for_empty_prompt and not asked
        nega |= {"zero_embeds": zeros, **_checked(sizes if negative_sizes is None else negative_sizes)}
        return shared, {**posi, **_checked(sizes)}, nega


def _checked(sizes: Inputs | None) -> Inputs:
    known = {"original_size", "crops_coords_top_left", "target_size"}
    if unknown := sorted((sizes or {}).keys() - known):
        raise UsageError(f"unknown sizes: {', '.join(unknown)}", hint=f"known: {', '.join(sorted(known))}")
    return dict(sizes or {})
