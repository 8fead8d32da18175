"""Latents of unit variance: the trained VAE with its per-channel statistics folded into its 1x1 convolutions."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from pasd_tiny.data import Crops
from pasd_tiny.networks import build_vae
from pasd_tiny.training import averaged_weights, part


def normalised_vae(seed: int, device: torch.device) -> Any:
    """The averaged VAE of stage `vae`, normalised, frozen.

    Trained freely, a channel of the latents may be twenty times larger than another; noise would drown the small one
    and 8-bit weights would resolve neither alike.
    """
    vae = build_vae()
    vae.load_state_dict(part(averaged_weights("vae"), "vae"))
    vae.eval().requires_grad_(False).to(device)
    images, _ = Crops(torch.Generator().manual_seed(seed)).clean(64, 96)
    images = images.to(device) * 2 - 1
    _normalise(vae, vae.encode(images).latent_dist.mode())
    return vae


def trained_vae(seed: int, device: torch.device) -> Any:
    """The normalised VAE with the decoder of stage `decoder`."""
    vae = normalised_vae(seed, device)
    for name, module in decoder_modules(vae).items():
        module.load_state_dict(part(averaged_weights("decoder"), name))
    return vae


def narrow_posterior(vae: Any, deviation: float = 0.03) -> None:
    """Give all latents one small deviation: the sampler starts from a draw, which is to be the picture."""
    variance = vae.quant_conv.out_channels // 2
    vae.quant_conv.weight.data[variance:] = 0
    vae.quant_conv.bias.data[variance:] = 2 * math.log(deviation)


def decoder_modules(vae: Any) -> dict[str, nn.Module]:
    """The half of the VAE that turns latents into pictures."""
    return {"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder}


def _normalise(vae: Any, latents: Tensor) -> None:
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    count = len(mean)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:count] /= deviation[:, None, None, None]
    before.bias[:count] = (before.bias[:count] - mean) / deviation
    before.bias[count:] -= 2 * deviation.log()  # the posterior's logarithm of the variance
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= deviation[:, None, None]
