"""PASD super-resolution: the one sampler that calibration, evaluation, packaging and the report run.

What differs between them is the backend of `text_encoder`, `vae_encoder`, `unet`, `controlnet` and `vae_decoder`:
attributes of the pipeline, any callable with the model's calling convention, fed with batch 1 and, with latent tiles,
with one static shape.
"""

from collections.abc import Callable
from typing import Any, Unpack

from torch import Tensor

from sdconvert.errors import CheckpointError
from sdconvert.pipelines.latent_diffusion import (
    LatentDiffusionParts,
    LatentDiffusionPipeline,
    SamplingRequest,
    VAEEncoder,
)
from sdconvert.pipelines.latent_units import Decoder
from sdconvert.pipelines.pasd_units import (
    ColorFix,
    ControlImageEncoder,
    ImagePreprocessor,
    LatentsInitializer,
    NoiseInitializer,
    ShapeChecker,
)
from sdconvert.pipelines.prompt_units import PromptEmbedder, guided_sides
from sdconvert.pipelines.shape import SamplingShape
from sdconvert.pipelines.stable_diffusion import model_fn_stable_diffusion
from sdconvert.pipelines.unit import Inputs

# Field note of the seed: below this short side a PASD of Stable Diffusion's size gives poor pictures.
MIN_SHORT_SIDE = 768


class PASDPipeline(LatentDiffusionPipeline):
    """Super-resolution with PASD: a picture is enlarged, encoded, noised and sampled again under its own control.

    Attributes that take another backend, each called with batch 1:

    * `unet(sample, timestep, encoder_hidden_states=…, down_block_additional_residuals=…,
      mid_block_additional_residual=…, return_dict=False)` returns a tuple that begins with the prediction;
    * `controlnet(sample, timestep, encoder_hidden_states=…, controlnet_cond=…, conditioning_scale=…,
      return_dict=False)` returns a tuple that ends with the down residuals and the mid residual;
    * `text_encoder(input_ids)` returns a tuple that begins with the last hidden state; its `config` is the model's;
    * `vae_encoder(sample)` returns the moments of the latents for a picture in [-1, 1];
    * `vae_decoder(latents)` returns the picture in [-1, 1] for latents divided by the scaling factor.

    Args:
        unet: PASD UNet.
        controlnet: PASD ControlNet.
        **parts: As `LatentDiffusionPipeline` takes them; the text encoder is CLIP's.

    Raises:
        CheckpointError: The ControlNet reduces its image by another factor than the VAE.
    """

    unit_classes = (
        ShapeChecker,
        ImagePreprocessor,
        PromptEmbedder,
        ControlImageEncoder,
        NoiseInitializer,
        LatentsInitializer,
    )
    post_unit_classes = (Decoder, ColorFix)
    in_iteration_models = ("unet", "controlnet")
    # A stock UNet would run, and leave the pixels out.
    model_families = {"unet": ("PASD UNet", "PASD light UNet")}  # noqa: RUF012
    output_param = "output_image"
    upscale = 4
    model_fn = staticmethod(model_fn_stable_diffusion)

    def __init__(self, *, unet: Any, controlnet: Any, **parts: Unpack[LatentDiffusionParts]) -> None:
        super().__init__(**parts)
        self.unet, self.controlnet = unet, controlnet
        self.vae_encoder: Callable[[Tensor], Tensor] = VAEEncoder(self.vae)
        self.stable_diffusion_size: bool = unet is not None and unet.config.block_out_channels[0] >= 320
        self._check_control_factor()

    def _check_control_factor(self) -> None:
        if self.controlnet is None:
            return
        control_factor = 2 ** (len(self.controlnet.config.conditioning_embedding_out_channels) - 1)
        if control_factor != self.vae_scale_factor:
            raise CheckpointError(
                f"the ControlNet reduces its image by {control_factor}, the VAE by {self.vae_scale_factor}",
                hint="conditioning_embedding_out_channels must be as long as the VAE's block_out_channels",
            )

    def size_warning(self, shape: SamplingShape) -> str:
        """What to expect of a picture of this size; the empty string where nothing speaks against it."""
        if not self.stable_diffusion_size or min(shape.requested) >= MIN_SHORT_SIDE:
            return ""
        return (
            f"a short side of {min(shape.requested)} pixels gives poor results with this model; "
            f"use at least {MIN_SHORT_SIDE}"
        )

    def inputs(
        self,
        image: Tensor,
        *,
        prompt: str,
        num_inference_steps: int,
        negative_prompt: str | None = None,
        guidance_scale: float = 1.0,
        conditioning_scale: float = 1.0,
        upscale: int = 4,
        added_noise_level: int | None = None,
        color_fix: bool = False,
        **sampling: Unpack[SamplingRequest],
    ) -> tuple[Inputs, Inputs, Inputs]:
        """Inputs of a run that gives a picture (3, h·upscale, w·upscale).

        Args:
            image: Low-resolution RGB picture (3, h, w) in [0, 1].
            prompt: What the picture shows.
            num_inference_steps: Sampling steps.
            negative_prompt: What it should not show; needs guidance.
            guidance_scale: Classifier-free guidance, two runs per step; 1: none.
            conditioning_scale: Weight of the ControlNet's residuals.
            upscale: Enlargement.
            added_noise_level: Timestep of PASD's second noising of the start (it uses 900); None: noised once.
            color_fix: Take the colours from the enlarged input, as PASD does. Off by default, because it replaces
                the low band of the result by one that no network computed: errors there would go unmeasured.
            **sampling: See `SamplingRequest`.

        Raises:
            UsageError: An argument is out of range, or would have no effect.
        """
        shared = self.common_inputs(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, **sampling)
        shared |= {
            "image": image,
            "upscale": upscale,
            "conditioning_scale": conditioning_scale,
            "added_noise_level": added_noise_level,
            "color_fix": color_fix,
        }
        posi, nega = guided_sides({"prompt": prompt}, {"negative_prompt": negative_prompt}, guidance_scale)
        return shared, posi, nega
