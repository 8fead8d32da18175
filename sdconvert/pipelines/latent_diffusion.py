"""What pipelines over an autoencoder's latents share: its facts, its decoder, and the request that all understand."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sdconvert.errors import UsageError
from sdconvert.pipelines.base import BasePipeline
from sdconvert.pipelines.unit import Inputs


class VAEDecoder(nn.Module):
    """The decoding half of an `AutoencoderKL` as a model of its own."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        """Picture (1, 3, H, W) in [-1, 1] of unscaled latents (1, C, h, w)."""
        picture: Tensor = self.vae.decode(latent_sample, return_dict=False)[0]
        return picture


class LatentDiffusionPipeline(BasePipeline):
    """A pipeline whose sampler works on an autoencoder's latents.

    `vae_decoder(latents)` takes another backend; it returns the picture in [-1, 1] for unscaled latents.

    Args:
        vae: Autoencoder; its decoder becomes `vae_decoder`.
        scheduler: Sampler; every run works on a copy.
        device: Where models run.
        torch_dtype: Type of the intermediate tensors.
    """

    output_param = "decoded_image"

    def __init__(
        self,
        *,
        vae: Any,
        scheduler: Any,
        device: str | torch.device = "cpu",
        torch_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(device, torch_dtype)
        self.vae, self.scheduler = vae, scheduler
        self.vae_decoder: Callable[[Tensor], Tensor] = VAEDecoder(vae)
        # Facts of the checkpoint, taken while the models are the original ones: a backend has no config.
        self.vae_scale_factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_channels: int = vae.config.latent_channels
        self.scaling_factor: float = vae.config.scaling_factor
        self.patch_size = 1  # latents that the model in the loop reads at a time; a UNet takes any number

    def unscale_latents(self, latents: Tensor) -> Tensor:
        """Latents (…, C, h, w) off the sampler's scale, as the decoder takes them."""
        return latents / self.scaling_factor

    def common_inputs(
        self,
        *,
        num_inference_steps: int,
        guidance_scale: float,
        seed: int,
        latent_tile: int | None,
        latent_overlap: int | None,
    ) -> Inputs:
        """The shared inputs that every run has: a scheduler of its own, set to its steps, and a seeded generator.

        Raises:
            UsageError: Fewer than one step.
        """
        if num_inference_steps < 1:
            raise UsageError(f"num_inference_steps={num_inference_steps} samples nothing", hint="choose 1 or more")
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(num_inference_steps, device=self.device)
        return {
            "latent_tile": latent_tile,
            "latent_overlap": latent_overlap,
            "cfg_scale": guidance_scale,
            "generator": torch.Generator().manual_seed(seed),
            "scheduler": scheduler,
        }
