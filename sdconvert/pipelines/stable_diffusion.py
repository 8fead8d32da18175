"""Stable Diffusion 1 and 2, text to picture, with an optional ControlNet."""

from collections.abc import Callable
from typing import Any, Unpack

from torch import Tensor

from sdconvert.pipelines.base import Observer
from sdconvert.pipelines.latent_diffusion import LatentDiffusionParts
from sdconvert.pipelines.latent_units import ControlImagePreprocessor, InitialNoise, SizeChecker
from sdconvert.pipelines.loop import Each, Side
from sdconvert.pipelines.prompt_units import PromptEmbedder
from sdconvert.pipelines.shape import SamplingShape
from sdconvert.pipelines.text_to_image import ControlledRequest, TextToImagePipeline
from sdconvert.pipelines.unit import Inputs


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
    added_cond_kwargs: Inputs | None = None,
    observer: Observer | None = None,
    each: Each = map,
) -> Tensor:
    """Prediction (1, C, h, w) of one side at one step: ControlNet and UNet per tile, then the weighted mean.

    Args:
        unet: UNet, or its backend.
        latents: (1, C, h, w).
        timestep: (1,).
        prompt_embeds: (1, tokens, channels).
        sampling_shape: Its grid cuts the tiles.
        progress_id: Index of the step.
        side: Side of guidance.
        controlnet: ControlNet, or its backend; called only with a `control_image`.
        control_image: (1, 3, H, W) in [0, 1], or None.
        conditioning_scale: Weight of the ControlNet's residuals.
        added_cond_kwargs: Further conditions of both models, such as SDXL's.
        observer: Sees every call.
        each: Goes over the tiles.
    """
    grid = sampling_shape.grid
    observe = observing(observer, progress_id, side)
    text: Inputs = {"encoder_hidden_states": prompt_embeds}
    added: Inputs = {} if added_cond_kwargs is None else {"added_cond_kwargs": added_cond_kwargs}

    def predict(tile: int) -> Tensor:
        sample = {"sample": grid.crop(latents, tile), "timestep": timestep}
        conditions = {**text, **added}
        if control_image is not None:
            factor = control_image.shape[-1] // latents.shape[-1]
            control = {
                **text,
                "controlnet_cond": grid.crop(control_image, tile, factor),
                "conditioning_scale": conditioning_scale,
                **added,
            }
            observe("controlnet", {**sample, **control}, tile)
            *_, down, mid = controlnet(*sample.values(), **control, return_dict=False)
            conditions |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        observe("unet", {**sample, **conditions}, tile)
        prediction: Tensor = unet(*sample.values(), **conditions, return_dict=False)[0]
        return prediction

    return grid.blend(each(predict, range(len(grid.corners))))


class StableDiffusionPipeline(TextToImagePipeline):
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
        controlnet: Only for runs with a control image.
        **parts: As `LatentDiffusionPipeline` takes them.
    """

    unit_classes = (SizeChecker, PromptEmbedder, ControlImagePreprocessor, InitialNoise)
    in_iteration_models = ("unet", "controlnet")
    iteration_triggers = {"controlnet": "control_image"}  # noqa: RUF012
    model_fn = staticmethod(model_fn_stable_diffusion)

    def __init__(self, *, unet: Any, controlnet: Any = None, **parts: Unpack[LatentDiffusionParts]) -> None:
        super().__init__(**parts)
        self.unet, self.controlnet = unet, controlnet
        self.default_size = self.trained_size(unet.config.sample_size)

    def inputs(
        self,
        prompt: str | None = None,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        **request: Unpack[ControlledRequest],
    ) -> tuple[Inputs, Inputs, Inputs]:
        """Inputs of a run; defaults are diffusers'.

        Args:
            prompt: What the picture shows.
            num_inference_steps: Sampling steps.
            guidance_scale: Classifier-free guidance, two runs per step; 1: none.
            prompt_embeds: Embeddings (1, tokens, channels) in place of the prompt.
            negative_prompt_embeds: Likewise of the negative prompt.
            **request: See `ControlledRequest`.

        Raises:
            UsageError: An argument is out of range, or would have no effect.
        """
        return self.text_to_image_inputs(
            {"prompt": prompt, "prompt_embeds": prompt_embeds},
            {"prompt_embeds": negative_prompt_embeds},
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            **request,
        )


def observing(observer: Observer | None, progress_id: int, side: Side) -> Callable[[str, Inputs, int], None]:
    """What tells `observer`, if there is one, of a call: component, inputs by name, tile."""

    def observe(component: str, inputs: Inputs, tile: int) -> None:
        if observer is not None:
            observer.record(component, inputs, step=progress_id, side=side, tile=tile)

    return observe
