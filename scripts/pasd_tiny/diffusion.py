"""Stages `diffusion` and `finetune`: UNet, ControlNet and text encoder, first on latents, then on pixels.

`diffusion` is the usual regression of the clean latents from noised ones. `finetune` trains what the few-step sampler
really meets: it rolls the sampler out to a random step and compares the decoded prediction with the photograph, the
decoder learning along; some steps are of the VAE alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTokenizer

from pasd_tiny.data import Batch, Crops
from pasd_tiny.latents import decoder_modules, encoder_modules, trained_vae
from pasd_tiny.networks import Networks, build_networks, build_scheduler
from pasd_tiny.text import encode
from pasd_tiny.training import Trainer, averaged_weights, part
from pasd_tiny.vae import pixel_loss, vae_loss

STEPS = 4
_STEP_SHARES = (0.64, 0.12, 0.12, 0.12)  # of `finetune`; in the first step the control image alone gives the picture
_RGBS_WEIGHT = 0.05
_LATENT_WEIGHT = 0.05
_HIGH_NOISE_SHARE = 0.4  # of the training timesteps; there the control image alone must give the picture
_HIGH_NOISE = 700
_SQUARED_WEIGHT = 8  # where detail is lost, L1 asks for the median of what may have been there, PSNR for the mean
_RECONSTRUCT_EVERY = 16  # steps of `finetune` in which the VAE alone learns, so that it stays an autoencoder


@dataclass
class Task:
    """What both stages share."""

    networks: Networks
    vae: Any
    tokenizer: CLIPTokenizer
    scheduler: Any
    crops: Crops
    generator: torch.Generator
    device: torch.device

    @property
    def scale(self) -> float:
        """Factor from the VAE's latents to those of the UNet."""
        return float(self.vae.config.scaling_factor)

    def latents(self, images: Tensor) -> Tensor:
        """Scaled latents of images in [0, 1]: the posterior's mean."""
        with torch.no_grad():
            mean: Tensor = self.vae.encode(images * 2 - 1).latent_dist.mode()
        return mean * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1] of scaled latents."""
        images: Tensor = self.vae.decode(latents / self.scale).sample
        return images

    def normal(self, like: Tensor) -> Tensor:
        """Unit noise of the shape of `like`."""
        return torch.randn(like.shape, generator=self.generator).to(like)

    def batch(self, count: int, size: int) -> Batch:
        """Crops on the device."""
        batch = self.crops.degraded(count, size)
        return Batch(batch.full.to(self.device), batch.control.to(self.device), batch.captions)

    def noised(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Forward diffusion to `timesteps`: sqrt(a) latents + sqrt(1 - a) noise."""
        alphas = self.scheduler.alphas_cumprod.to(self.device)[timesteps].view(-1, 1, 1, 1)
        noised: Tensor = alphas.sqrt() * latents + (1 - alphas).sqrt() * self.normal(latents)
        return noised

    def predict(self, sample: Tensor, timesteps: Tensor, text: Tensor, control: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Predicted clean latents, and the ControlNet's small pictures."""
        networks = self.networks
        rgbs, down, mid = networks.controlnet(
            sample,
            timesteps,
            encoder_hidden_states=text,
            controlnet_cond=control,
            return_dict=False,
        )
        predicted = networks.unet(
            sample,
            timesteps,
            encoder_hidden_states=text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]
        return predicted, rgbs


def train_diffusion(seed: int, minutes: float, device: torch.device, tokenizer: CLIPTokenizer) -> None:
    """Train UNet, ControlNet and text encoder on latents: mean squared error of the predicted sample."""
    task = _task(seed, device, tokenizer)
    trainer = Trainer(
        "diffusion",
        task.networks.named(),
        task.generator,
        minutes,
        learning_rate=1.5e-3,
    )

    def loss(step: int) -> Tensor:
        batch = task.batch(2, 128) if step % 4 == 3 else task.batch(8, 64)
        clean = task.latents(batch.full)
        text = encode(tokenizer, task.networks.text_encoder, batch.captions)
        timesteps = _timesteps(len(clean), task.generator).to(device)
        predicted, rgbs = task.predict(task.noised(clean, timesteps), timesteps, text, batch.control)
        return functional.mse_loss(predicted, clean) + _RGBS_WEIGHT * rgbs_loss(rgbs, batch.full)

    trainer.run(loss)


def train_finetune(seed: int, minutes: float, device: torch.device, tokenizer: CLIPTokenizer) -> None:
    """Train the networks and the VAE on the pixels of the few-step sampler's predictions."""
    task = _task(seed, device, tokenizer)
    load_networks(task.networks, averaged_weights("diffusion"))
    modules = task.networks.named() | decoder_modules(task.vae) | encoder_modules(task.vae)
    for module in modules.values():
        module.requires_grad_(True)
    trainer = Trainer("finetune", modules, task.generator, minutes, learning_rate=2e-3, average=0.998)

    def loss(step: int) -> Tensor:
        batch = task.batch(2, 128) if step % 2 else task.batch(8, 64)
        images = batch.full * 2 - 1
        if step % _RECONSTRUCT_EVERY == 0:
            return vae_loss(task.vae, images)
        clean = task.latents(batch.full)
        text = encode(tokenizer, task.networks.text_encoder, batch.captions)
        sample, timesteps = _roll_out(task, batch, text)
        predicted, rgbs = task.predict(sample, timesteps, text, batch.control)
        latents = functional.mse_loss(predicted, clean)
        decoded = task.decode(predicted)
        pixels = 0.5 * pixel_loss(decoded, images) + _SQUARED_WEIGHT * functional.mse_loss(decoded, images)
        return pixels + _LATENT_WEIGHT * latents + _RGBS_WEIGHT * rgbs_loss(rgbs, batch.full)

    trainer.run(loss)


def load_networks(networks: Networks, weights: dict[str, Tensor]) -> None:
    """Load checkpoint weights, keyed `network.parameter`, into the networks."""
    for name, network in networks.named().items():
        network.load_state_dict(part(weights, name))


def rgbs_loss(rgbs: list[Tensor], images: Tensor) -> Tensor:
    """L1 of the ControlNet's small pictures against the photograph in [-1, 1], as PASD trains them."""
    losses = [
        functional.l1_loss(
            rgb,
            functional.interpolate(images * 2 - 1, rgb.shape[-2:], mode="bilinear", antialias=True),
        )
        for rgb in rgbs
    ]
    return torch.stack(losses).mean()


def _task(seed: int, device: torch.device, tokenizer: CLIPTokenizer) -> Task:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    networks = build_networks(tokenizer)
    for network in networks.named().values():
        network.to(device)
    return Task(
        networks,
        trained_vae(seed, device),
        tokenizer,
        build_scheduler(),
        Crops(generator),
        generator,
        device,
    )


def _timesteps(count: int, generator: torch.Generator) -> Tensor:
    uniform = torch.randint(0, 1000, (count,), generator=generator)
    high = torch.randint(_HIGH_NOISE, 1000, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < _HIGH_NOISE_SHARE, high, uniform)


@torch.no_grad()
def _roll_out(task: Task, batch: Batch, text: Tensor) -> tuple[Tensor, Tensor]:
    """Sample as inference does, down to a random step; return what the networks meet there."""
    task.scheduler.set_timesteps(STEPS, device=task.device)
    timesteps = task.scheduler.timesteps
    stop = int(torch.multinomial(torch.tensor(_STEP_SHARES), 1, generator=task.generator))
    count = len(batch.full)
    sample = task.noised(task.latents(batch.control), timesteps[:1].expand(count))
    for timestep in timesteps[:stop]:
        predicted, _ = task.predict(sample, timestep.expand(count), text, batch.control)
        sample = task.scheduler.step(predicted, timestep, sample).prev_sample
    return sample, timesteps[stop].expand(count)
