"""What pipelines over an autoencoder's latents share: its facts, its decoder, and the request that all understand."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from sdconvert.errors import UsageError
from sdconvert.pipelines.base import BasePipeline
from sdconvert.pipelines.shape import SamplingShape, sampling_shape
from sdconvert.pipelines.unit import Inputs


class VAEEncoder(nn.Module):
    """The encoding half of an `AutoencoderKL` as a model of its own."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> Tensor:
        """Moments (1, 2 C, h, w) of the latents of a picture (1, 3, H, W) in [-1, 1]."""
        moments: Tensor = self.vae.encode(sample, return_dict=False)[0].parameters
        return moments


class VAEDecoder(nn.Module):
    """The decoding half of an `AutoencoderKL` as a model of its own."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        """Picture (1, 3, H, W) in [-1, 1] of unscaled latents (1, C, h, w)."""
        picture: Tensor = self.vae.decode(latent_sample, return_dict=False)[0]
        return picture


class LatentDiffusionParts(TypedDict):
    """What `LatentDiffusionPipeline` is made of, for the signatures of its subclasses."""

    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    device: NotRequired[str | torch.device]
    torch_dtype: NotRequired[torch.dtype]


class SamplingRequest(TypedDict, total=False):
    """What every request may say about how it is sampled; all of it may be left out.

    Attributes:
        seed: Seed of all noise; 0 if not given.
        latent_tile: Side of the latent tiles that the models see; None: the whole picture at once.
        latent_overlap: Overlap of the tiles in latents; None: 8, at most half a tile.
    """

    seed: int
    latent_tile: int | None
    latent_overlap: int | None


class LatentDiffusionPipeline(BasePipeline):
    """A pipeline whose sampler works on an autoencoder's latents.

    `vae_decoder(latents)` takes another backend; it returns the picture in [-1, 1] for unscaled latents.

    A subclass names its own models in its constructor and hands the other arguments on (`LatentDiffusionParts`).

    Args:
        vae: Autoencoder; its decoder becomes `vae_decoder`.
        text_encoder: Text encoder; None where embeddings are given to every run.
        tokenizer: Its tokenizer.
        scheduler: Sampler; every run works on a copy.
        device: Where models run.
        torch_dtype: Type of the intermediate tensors.
    """

    output_param = "decoded_image"
    upscale: ClassVar[int] = 1
    """Enlargement where none is named."""

    def __init__(
        self,
        *,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        device: str | torch.device = "cpu",
        torch_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(device, torch_dtype)
        self.vae, self.scheduler = vae, scheduler
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.vae_decoder: Callable[[Tensor], Tensor] = VAEDecoder(vae)
        # Facts of the checkpoint, taken while the models are the original ones: a backend has no config.
        self.vae_scale_factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_channels: int = vae.config.latent_channels
        self.scaling_factor: float = vae.config.scaling_factor
        self.patch_size = 1  # latents that the model in the loop reads at a time; a UNet takes any number

    def sampling_shape(
        self,
        height: int,
        width: int,
        *,
        upscale: int | None = None,
        latent_tile: int | None = None,
        latent_overlap: int | None = None,
    ) -> SamplingShape:
        """Sizes and tiles of a run on a picture of `height` x `width` pixels, as `__call__` will use them.

        Sizes are rounded up to whole latents and patches; the result is cut back.

        Raises:
            UsageError: No picture has such a size, or no tiles.
        """
        return sampling_shape(
            height,
            width,
            upscale=self.upscale if upscale is None else upscale,
            factor=self.vae_scale_factor,
            latent_tile=latent_tile,
            latent_overlap=latent_overlap,
            multiple=self.patch_size,
        )

    def unscale_latents(self, latents: Tensor) -> Tensor:
        """Latents (…, C, h, w) off the sampler's scale, as the decoder takes them."""
        return latents / self.scaling_factor

    def common_inputs(
        self,
        *,
        num_inference_steps: int,
        guidance_scale: float,
        seed: int = 0,
        latent_tile: int | None = None,
        latent_overlap: int | None = None,
    ) -> Inputs:
        """The shared inputs that every run has: a scheduler of its own, set to its steps, and a seeded generator.

        Args:
            num_inference_steps: Sampling steps.
            guidance_scale: Classifier-free guidance, two runs per step; 1: none.
            seed: See `SamplingRequest`.
            latent_tile: Likewise.
            latent_overlap: Likewise.

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
