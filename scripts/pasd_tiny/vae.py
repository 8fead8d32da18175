"""Stages `vae` and `decoder`: the autoencoder between pictures and latents.

A decoder needs longer than its encoder. Once `vae` has fixed the latents, `decoder` goes on with the encoder frozen.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pasd_tiny.data import Crops
from pasd_tiny.latents import decoder_modules, normalised_vae
from pasd_tiny.networks import build_vae
from pasd_tiny.training import Trainer

_KL_WEIGHT = 1e-6
_GRADIENT_WEIGHT = 0.5
_LATENT_NOISE = 0.03  # of unit variance


def train_vae(seed: int, minutes: float, device: torch.device) -> None:
    """Train the VAE on crops of 64 pixels, of 128 every fourth step: L1, L1 of gradients, and a trace of KL."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae, crops = build_vae().to(device), Crops(generator)
    trainer = Trainer("vae", {"vae": vae}, generator, minutes, learning_rate=3e-3)

    def loss(step: int) -> Tensor:
        images, _ = crops.clean(2, 128) if step % 4 == 3 else crops.clean(8, 64)
        with torch.autocast(device.type, torch.bfloat16):
            return vae_loss(vae, images.to(device) * 2 - 1)

    trainer.run(loss)


def train_decoder(seed: int, minutes: float, device: torch.device) -> None:
    """Train the decoder alone, on slightly noised latents, as the sampler's are."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae, crops = normalised_vae(seed, device), Crops(generator)
    modules = decoder_modules(vae)
    for module in modules.values():
        module.requires_grad_(True)
    trainer = Trainer("decoder", modules, generator, minutes, learning_rate=2e-3)

    def loss(step: int) -> Tensor:
        images, _ = crops.clean(2, 128) if step % 2 else crops.clean(8, 64)
        images = images.to(device) * 2 - 1
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mode()
        noise = torch.randn(latents.shape, generator=generator).to(device)
        return pixel_loss(vae.decode(latents + _LATENT_NOISE * noise).sample, images)

    trainer.run(loss)


def vae_loss(vae: Any, images: Tensor) -> Tensor:
    """Loss of one batch, images in [-1, 1]."""
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.sample()).sample.float()
    loss: Tensor = pixel_loss(decoded, images) + _KL_WEIGHT * posterior.kl().mean()
    return loss


def pixel_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """L1 of pixels, of horizontal and vertical differences, and of 8x8 means, images in [-1, 1].

    The means weigh little in the pixels' L1, but they are the colour, and group norms make them the last to be learnt.
    """
    error = decoded - images
    rows, columns = error.diff(dim=-2).abs().mean(), error.diff(dim=-1).abs().mean()
    means = functional.avg_pool2d(error, 8).abs().mean()
    return error.abs().mean() + _GRADIENT_WEIGHT * (rows + columns) / 2 + means
