"""PASD super-resolution: the one sampler that calibration, evaluation, packaging and the report run.

What differs between them is the backend of `unet`, `controlnet` and `vae_decoder`: attributes of the pipeline, any
callable with the model's calling convention, fed with batch 1 and, with latent tiles, with one static shape.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from sdconvert.errors import CheckpointError
from sdconvert.models.pasd import load_pasd
from sdconvert.pipelines.base import Observer
from sdconvert.pipelines.latent_diffusion import LatentDiffusionPipeline
from sdconvert.pipelines.latent_units import Decoder
from sdconvert.pipelines.loading import load_auxiliaries
from sdconvert.pipelines.loop import Side
from sdconvert.pipelines.model_config import ModelConfig
from sdconvert.pipelines.pasd_units import (
    ColorFix,
    ControlImageEncoder,
    ImagePreprocessor,
    LatentsInitializer,
    NoiseInitializer,
    ShapeChecker,
)
from sdconvert.pipelines.prompt_units import PromptEmbedder, guided_sides
from sdconvert.pipelines.residency import ModelResidency
from sdconvert.pipelines.shape import SamplingShape, sampling_shape
from sdconvert.pipelines.stable_diffusion import observing, predict_noise
from sdconvert.pipelines.unit import Inputs

# Field note of the seed: below this short side a PASD of Stable Diffusion's size gives poor pictures.
MIN_SHORT_SIDE = 768


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


class PASDPipeline(LatentDiffusionPipeline):
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
    output_param = "output_image"
    model_fn = staticmethod(model_fn_pasd)

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
        super().__init__(vae=vae, scheduler=scheduler, device=device, torch_dtype=torch_dtype)
        self.unet, self.controlnet = unet, controlnet
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
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

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path | None = None,
        *,
        model_configs: Sequence[ModelConfig] = (),
        device: str | torch.device = "cpu",
        torch_dtype: torch.dtype = torch.float32,
        residency: ModelResidency | None = None,
    ) -> Self:
        """Read PASD, from the disk only, in evaluation mode; see `BasePipeline.from_pretrained`.

        Args:
            folder: Holds `unet`, `controlnet`, `vae`, `text_encoder`, `tokenizer` and `scheduler`.
            model_configs: Files and folders of models, in place of `folder`.
            device: Where models run.
            torch_dtype: Type of weights and intermediate tensors.
            residency: Given one, weights stay on the disk until a unit calls for them.

        Raises:
            CheckpointError: A part is missing or damaged, or its weights do not fit its config.
            MissingModelError: A model is not among `model_configs`.
        """
        if folder is None or model_configs or residency is not None or torch_dtype != torch.float32:
            return super().from_pretrained(
                folder, model_configs=model_configs, device=device, torch_dtype=torch_dtype, residency=residency
            )
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
        seed: int = 0,
        upscale: int = 4,
        latent_tile: int | None = None,
        latent_overlap: int | None = None,
        added_noise_level: int | None = None,
        color_fix: bool = False,
    ) -> tuple[Inputs, Inputs, Inputs]:
        """Inputs of a run that gives a picture (3, h·upscale, w·upscale).

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
        shared |= {
            "image": image,
            "upscale": upscale,
            "conditioning_scale": conditioning_scale,
            "added_noise_level": added_noise_level,
            "color_fix": color_fix,
        }
        posi, nega = guided_sides({"prompt": prompt}, {"negative_prompt": negative_prompt}, guidance_scale)
        return shared, posi, nega
