"""Stage `diffusion`: UNet, ControlNet, text encoder and decoder, trained on the pixels of the few-step sampler.

The sampler starts from the latents of the enlarged picture under a little noise, so the loss is taken where the sampler
really goes: one update at its first step, the next on the same crops at a later step, reached from what the first one
predicted. The loss is PSNR itself: where detail is lost, it asks for the mean of what may have been there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from pasd_tiny.data import Batch, Crops
from pasd_tiny.latents import narrow_posterior, trained_vae
from pasd_tiny.networks import Networks, build_networks, build_scheduler
from pasd_tiny.text import encode
from pasd_tiny.training import Trainer
from sdconvert import load_pasd

STEPS = 4
_LUMA = (0.299, 0.587, 0.114)
_LUMA_WEIGHT = 2.0  # JPEG keeps little colour; what is left to win, and what is measured, is luma
_COARSE_WEIGHT = 4.0  # of 8x8 means: all of that error can be learnt, most of the rest cannot
_FLOOR = 1e-4  # of the error in the logarithm, about PSNR 46 dB
_RGBS_WEIGHT = 0.02
_RECONSTRUCTION_WEIGHT = 0.1  # the VAE stays an autoencoder
_RECONSTRUCT_EVERY = 16
_WIDE_EVERY = 2  # pairs of updates on crops of the size of a device tile, the others on four times as many small ones


@dataclass
class Reached:
    """Where a prediction left the sampler: what the next update on the same crops starts from."""

    batch: Batch
    sample: Tensor
    predicted: Tensor
    """Predicted clean latents."""


class SamplerLoss:
    """The loss of one step of the sampler, first and later steps in turn.

    Args:
        networks: UNet, ControlNet and text encoder, on `device`.
        vae: Autoencoder whose decoder is trained along.
        tokenizer: Of the captions.
        generator: Source of all randomness.
        device: Where the networks are.
    """

    def __init__(
        self, networks: Networks, vae: Any, tokenizer: CLIPTokenizer, generator: torch.Generator, device: torch.device
    ) -> None:
        self.networks, self.vae, self.tokenizer = networks, vae, tokenizer
        self.generator, self.device = generator, device
        self.crops = Crops(generator)
        self.scheduler = build_scheduler()
        self.scheduler.set_timesteps(STEPS, device=device)
        self.alphas = self.scheduler.alphas_cumprod.to(device)
        self.reached: Reached | None = None

    def __call__(self, step: int) -> Tensor:
        """Loss of update `step`."""
        if step % _RECONSTRUCT_EVERY == _RECONSTRUCT_EVERY - 1:
            return self._reconstruction(self._batch(step).full)
        if self.reached is None:
            batch = self._batch(step)
            return self._loss(batch, self._start(batch), self.scheduler.timesteps[0])
        reached, self.reached = self.reached, None
        later = int(torch.randint(1, STEPS, (), generator=self.generator))
        timestep = self.scheduler.timesteps[later]
        return self._loss(reached.batch, self._along(reached, timestep), timestep, keep=False)

    def _batch(self, step: int) -> Batch:
        wide = (step // 2) % _WIDE_EVERY == _WIDE_EVERY - 1
        batch = self.crops.degraded(*((2, 128) if wide else (8, 64)))
        return Batch(batch.full.to(self.device), batch.control.to(self.device), batch.captions)

    def _loss(self, batch: Batch, sample: Tensor, timestep: Tensor, keep: bool = True) -> Tensor:
        text = encode(self.tokenizer, self.networks.text_encoder, batch.captions)
        velocity, rgbs = self._predict(sample, timestep.expand(len(sample)), text, batch.control)
        alpha = self.alphas[timestep]
        predicted = alpha.sqrt() * sample - (1 - alpha).sqrt() * velocity
        if keep:
            self.reached = Reached(batch, sample, predicted.detach())
        images = batch.full * 2 - 1
        return distortion(self._decode(predicted), images) + _RGBS_WEIGHT * rgbs_loss(rgbs, images)

    def _predict(self, sample: Tensor, timesteps: Tensor, text: Tensor, control: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Predicted velocity, and the ControlNet's small pictures."""
        networks = self.networks
        rgbs, down, mid = networks.controlnet(
            sample, timesteps, encoder_hidden_states=text, controlnet_cond=control, return_dict=False
        )
        velocity = networks.unet(
            sample,
            timesteps,
            encoder_hidden_states=text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]
        return velocity, rgbs

    @torch.no_grad()
    def _start(self, batch: Batch) -> Tensor:
        """The noised latents of the enlarged picture, as the pipeline's `LatentsInitializer` makes them."""
        posterior = self.vae.encode(batch.control * 2 - 1).latent_dist
        latents = posterior.mean + posterior.std * self._normal(posterior.mean)
        alpha = self.alphas[self.scheduler.timesteps[0]]
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * self._normal(latents)

    def _along(self, reached: Reached, timestep: Tensor) -> Tensor:
        """DDIM's step (Song et al. 2021, eq. 12) from the first timestep to `timestep`."""
        first, alpha = self.alphas[self.scheduler.timesteps[0]], self.alphas[timestep]
        noise = (reached.sample - first.sqrt() * reached.predicted) / (1 - first).sqrt()
        return alpha.sqrt() * reached.predicted + (1 - alpha).sqrt() * noise

    def _reconstruction(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            latents = self.vae.encode(images * 2 - 1).latent_dist.mode()
        return _RECONSTRUCTION_WEIGHT * distortion(self._decode(latents), images * 2 - 1)

    def _decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.vae.decode(latents).sample
        return images

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like)


def train_diffusion(
    seed: int, minutes: float, device: torch.device, tokenizer: CLIPTokenizer, initial: Path | None
) -> None:
    """Train UNet, ControlNet, text encoder and decoder; the encoder stays as it is.

    Args:
        seed: Seed of all randomness.
        minutes: Budget, earlier runs included.
        device: Where to train.
        tokenizer: Of the captions.
        initial: Exported folder to start from; without it, untrained networks and the VAE of the stages before.
    """
    torch.manual_seed(seed)
    networks, vae = _untrained(seed, tokenizer) if initial is None else _exported(initial, tokenizer)
    # The first prediction is then the start itself.
    networks.unet.conv_out.weight.data.zero_()
    networks.unet.conv_out.bias.data.zero_()
    narrow_posterior(vae)
    modules = networks.named() | {"vae": vae}
    for module in modules.values():
        module.requires_grad_(True).to(device)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    trainer = Trainer("diffusion", modules, generator, minutes, learning_rate=1.2e-3, average=0.998)
    trainer.run(SamplerLoss(networks, vae, tokenizer, generator, device))


def distortion(decoded: Tensor, images: Tensor) -> Tensor:
    """Mean over the batch of the logarithm of the squared error, which is PSNR, images (N, 3, H, W) in [-1, 1].

    The error is that of colours, of luma and of coarse colours. Without the logarithm, crops of grass and gravel, whose
    detail nobody can restore, drown what there is to learn in the calm ones.
    """
    error = decoded - images
    luma = (error * torch.tensor(_LUMA, device=error.device).view(3, 1, 1)).sum(1, keepdim=True)
    coarse = functional.avg_pool2d(error, 8)
    squared = [part.square().mean((1, 2, 3)) for part in (error, luma, coarse)]
    return (squared[0] + _LUMA_WEIGHT * squared[1] + _COARSE_WEIGHT * squared[2] + _FLOOR).log().mean()


def rgbs_loss(rgbs: list[Tensor], images: Tensor) -> Tensor:
    """L1 of the ControlNet's small pictures against the photograph in [-1, 1], as PASD trains them."""
    losses = [
        functional.l1_loss(rgb, functional.interpolate(images, rgb.shape[-2:], mode="bilinear", antialias=True))
        for rgb in rgbs
    ]
    return torch.stack(losses).mean()


def _untrained(seed: int, tokenizer: CLIPTokenizer) -> tuple[Networks, Any]:
    return build_networks(tokenizer), trained_vae(seed, torch.device("cpu"))


def _exported(folder: Path, tokenizer: CLIPTokenizer) -> tuple[Networks, Any]:
    """The networks of an exported folder, in float32."""
    networks = build_networks(tokenizer)
    unet, controlnet = load_pasd(folder)
    networks.unet.load_state_dict(unet.state_dict())
    networks.controlnet.load_state_dict(controlnet.state_dict())
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True)
    networks.text_encoder.load_state_dict(text_encoder.state_dict())
    vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True, torch_dtype=torch.float32)
    return networks, vae
