"""PixArt-α: a transformer in the place of the UNet, and T5 in the place of CLIP."""

from typing import Any, Unpack

import torch
from torch import Tensor

from sdconvert.pipelines.base import Observer
from sdconvert.pipelines.latent_diffusion import LatentDiffusionParts
from sdconvert.pipelines.latent_units import InitialNoise, SizeChecker
from sdconvert.pipelines.loop import Side
from sdconvert.pipelines.prompt_units import T5PromptEmbedder
from sdconvert.pipelines.shape import SamplingShape
from sdconvert.pipelines.stable_diffusion import observing
from sdconvert.pipelines.text_to_image import TextToImagePipeline, TextToImageRequest
from sdconvert.pipelines.unit import Inputs, PipelineUnit


class MicroConditions(PipelineUnit):
    """Tells models of 1024 pixels which size and shape the picture has; smaller ones were not trained on it."""

    def __init__(self) -> None:
        super().__init__(input_params=("sampling_shape",), output_params=("added_cond_kwargs",))

    def process(self, pipe: "PixArtAlphaPipeline", sampling_shape: SamplingShape) -> Inputs:
        """Return `added_cond_kwargs` with `resolution` (1, 2) and `aspect_ratio` (1, 1), or None for both."""
        if not pipe.has_micro_conditions:
            return {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        height, width = sampling_shape.processed
        options: dict[str, Any] = {"device": pipe.device, "dtype": pipe.torch_dtype}
        conditions = {
            "resolution": torch.tensor([[height, width]], **options),
            "aspect_ratio": torch.tensor([[height / width]], **options),
        }
        return {"added_cond_kwargs": conditions}


def model_fn_pixart_alpha(
    transformer: Any,
    latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    prompt_attention_mask: Tensor,
    added_cond_kwargs: Inputs,
    sampling_shape: SamplingShape,
    progress_id: int,
    side: Side,
    observer: Observer | None = None,
) -> Tensor:
    """Prediction (1, C, h, w) of one side at one step, tile by tile, without the variance that the model learned."""
    grid = sampling_shape.grid
    observe = observing(observer, progress_id, side)

    def predict(tile: int) -> Tensor:
        call = {
            "hidden_states": grid.crop(latents, tile),
            "encoder_hidden_states": prompt_embeds,
            "encoder_attention_mask": prompt_attention_mask,
            "timestep": timestep,
            "added_cond_kwargs": added_cond_kwargs,
        }
        observe("transformer", call, tile)
        sample = call.pop("hidden_states")
        prediction: Tensor = transformer(sample, **call, return_dict=False)[0]
        return prediction[:, : latents.shape[1]]

    return grid.blend(map(predict, range(len(grid.corners))))


class PixArtAlphaPipeline(TextToImagePipeline):
    """Makes a picture from text with PixArt-α.

    Sizes are used as they are asked for; diffusers' `use_resolution_binning` and `clean_caption`, which rewrite the
    request, have no counterpart. `transformer(hidden_states, encoder_hidden_states=…, encoder_attention_mask=…,
    timestep=…, added_cond_kwargs=…, return_dict=False)` takes another backend, called with batch 1.

    Args:
        transformer: `PixArtTransformer2DModel`.
        **parts: As `LatentDiffusionPipeline` takes them; the text encoder is T5's.
    """

    unit_classes = (SizeChecker, T5PromptEmbedder, MicroConditions, InitialNoise)
    in_iteration_models = ("transformer",)
    model_fn = staticmethod(model_fn_pixart_alpha)

    def __init__(self, *, transformer: Any, **parts: Unpack[LatentDiffusionParts]) -> None:
        super().__init__(**parts)
        self.transformer = transformer
        self.default_size = self.trained_size(transformer.config.sample_size)
        self.patch_size = transformer.config.patch_size
        self.has_micro_conditions: bool = transformer.use_additional_conditions

    def inputs(
        self,
        prompt: str | None = None,
        *,
        num_inference_steps: int = 20,
        guidance_scale: float = 4.5,
        embeds: Inputs | None = None,
        negative_embeds: Inputs | None = None,
        max_sequence_length: int = 120,
        **request: Unpack[TextToImageRequest],
    ) -> tuple[Inputs, Inputs, Inputs]:
        """Inputs of a run; defaults are diffusers'.

        Args:
            prompt: What the picture shows.
            num_inference_steps: Sampling steps; with 1, the result is the model's estimate of the clean picture.
            guidance_scale: Classifier-free guidance, two runs per step; 1: none.
            embeds: `prompt_embeds` (1, tokens, channels) and `prompt_attention_mask` (1, tokens), in place of the
                prompt.
            negative_embeds: Likewise of the negative prompt.
            max_sequence_length: Tokens that the prompt is padded or cut to.
            **request: See `TextToImageRequest`.

        Raises:
            UsageError: An argument is out of range, or would have no effect.
        """
        shared, posi, nega = self.text_to_image_inputs(
            {"prompt": prompt, **(embeds or {})},
            negative_embeds or {},
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            embeds=("prompt_embeds", "prompt_attention_mask"),
            **request,
        )
        return {**shared, "max_sequence_length": max_sequence_length}, posi, nega

    def step(self, scheduler: Any, **inputs: Any) -> Tensor:
        """As `BasePipeline.step`; the only step of a one-step model (PixArt-δ) goes straight to the clean latents."""
        if len(scheduler.timesteps) > 1:
            return super().step(scheduler, **inputs)
        timestep = scheduler.timesteps[inputs["progress_id"]]
        clean: Tensor = scheduler.step(inputs["noise_pred"], timestep, inputs["latents"], return_dict=False)[1]
        return clean
