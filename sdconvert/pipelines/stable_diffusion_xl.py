"""Stable Diffusion XL: two text encoders, and the sizes of the picture as further conditions."""

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from sdconvert.errors import CheckpointError, UsageError
from sdconvert.pipelines.latent_diffusion import LatentDiffusionParts
from sdconvert.pipelines.latent_units import ControlImagePreprocessor, InitialNoise, SizeChecker
from sdconvert.pipelines.prompt_units import DualPromptEmbedder
from sdconvert.pipelines.stable_diffusion import model_fn_stable_diffusion
from sdconvert.pipelines.text_to_image import ControlledRequest, TextToImagePipeline
from sdconvert.pipelines.unit import Inputs, PipelineUnit

Size = tuple[int, int]


class AddedConditions(PipelineUnit):
    """Tells the model, per side, the pooled prompt, which size the picture had, how it was cropped, which is wanted."""

    def __init__(self) -> None:
        keys = {key: key for key in ("text_embeds", "original_size", "crops_coords_top_left", "target_size")}
        super().__init__(
            separate_cfg=True,
            input_params=("height", "width"),
            input_params_posi=keys,
            input_params_nega=keys,
            output_params=("added_cond_kwargs",),
        )

    def process(
        self,
        pipe: "StableDiffusionXLPipeline",
        height: int,
        width: int,
        text_embeds: Tensor,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
    ) -> Inputs:
        """Return `added_cond_kwargs` with `text_embeds` and `time_ids` (1, 6); sizes not given are the result's."""
        size = (height, width)
        ids = (*(original_size or size), *crops_coords_top_left, *(target_size or size))
        time_ids = torch.tensor([ids], device=pipe.device, dtype=pipe.torch_dtype)
        return {"added_cond_kwargs": {"text_embeds": text_embeds, "time_ids": time_ids}}


class StableDiffusionXLPipeline(TextToImagePipeline):
    """Makes a picture from text with Stable Diffusion XL (base).

    Models are called as in `StableDiffusionPipeline`, and `unet` and `controlnet` get
    `added_cond_kwargs={"text_embeds": (1, projection), "time_ids": (1, 6)}` besides.

    Args:
        unet: UNet with the added conditions `text_time`.
        text_encoder_2: Second CLIP text encoder, with projection; None where `text_encoder` is.
        tokenizer_2: Tokenizer of the second.
        controlnet: Only for runs with a control image.
        force_zeros_for_empty_prompt: Without a negative prompt, the negative side gets zeros for embeddings.
        **parts: As `LatentDiffusionPipeline` takes them.

    Raises:
        CheckpointError: The UNet does not take SDXL's added conditions.
    """

    unit_classes = (SizeChecker, DualPromptEmbedder, AddedConditions, ControlImagePreprocessor, InitialNoise)
    in_iteration_models = ("unet", "controlnet")
    iteration_triggers = {"controlnet": "control_image"}  # noqa: RUF012
    model_fn = staticmethod(model_fn_stable_diffusion)

    def __init__(
        self,
        *,
        unet: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        controlnet: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        **parts: Unpack[LatentDiffusionParts],
    ) -> None:
        super().__init__(**parts)
        if unet.config.addition_embed_type != "text_time":
            raise CheckpointError(
                f"the UNet's addition_embed_type is {unet.config.addition_embed_type!r}, SDXL's is 'text_time'",
                hint="use StableDiffusionPipeline for Stable Diffusion 1 and 2",
            )
        self.unet, self.controlnet = unet, controlnet
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        self.latents_mean: Sequence[float] | None = self.vae.config.latents_mean
        self.latents_std: Sequence[float] | None = self.vae.config.latents_std
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        self.default_size = self.trained_size(unet.config.sample_size)

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
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        negative_prompt_2: str | None = None,
        embeds: Inputs | None = None,
        negative_embeds: Inputs | None = None,
        sizes: Inputs | None = None,
        negative_sizes: Inputs | None = None,
        **request: Unpack[ControlledRequest],
    ) -> tuple[Inputs, Inputs, Inputs]:
        """Inputs of a run; defaults are diffusers'.

        Args:
            prompt: What the picture shows.
            prompt_2: For the second encoder; None: the same.
            num_inference_steps: Sampling steps.
            guidance_scale: Classifier-free guidance, two runs per step; 1: none.
            negative_prompt_2: For the second encoder; None: the same. Without any negative prompt: zeros for
                embeddings, or the empty prompt.
            embeds: `prompt_embeds` (1, tokens, channels) and `text_embeds` (1, projection) in place of prompts.
            negative_embeds: Likewise of the negative side.
            sizes: Any of `original_size`, `crops_coords_top_left`, `target_size`, each (height, width) or (top, left).
            negative_sizes: Likewise of the negative side; None: as `sizes`.
            **request: See `ControlledRequest`.

        Raises:
            UsageError: An argument is out of range, or would have no effect.
        """
        shared, posi, nega = self.text_to_image_inputs(
            {"prompt": prompt, "prompt_2": prompt_2, **(embeds or {})},
            {"negative_prompt_2": negative_prompt_2, **(negative_embeds or {})},
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            embeds=("prompt_embeds", "text_embeds"),
            **request,
        )
        posi |= _checked(sizes)
        if guidance_scale == 1.0:
            if negative_sizes is not None:
                raise UsageError("negative_sizes has no effect without guidance", hint="give guidance_scale above 1")
            return shared, posi, {}
        asked = any(value is not None for value in (request.get("negative_prompt"), negative_prompt_2, negative_embeds))
        zeros = self.force_zeros_for_empty_prompt and not asked
        return (
            shared,
            posi,
            {**nega, "zero_embeds": zeros, **_checked(sizes if negative_sizes is None else negative_sizes)},
        )


def _checked(sizes: Inputs | None) -> Inputs:
    known = {"original_size", "crops_coords_top_left", "target_size"}
    if unknown := sorted((sizes or {}).keys() - known):
        raise UsageError(f"unknown sizes: {', '.join(unknown)}", hint=f"known: {', '.join(sorted(known))}")
    return dict(sizes or {})
