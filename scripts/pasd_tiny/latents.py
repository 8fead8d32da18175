"""Latents of unit variance: the trained VAE with its per-channel statistics folded into its 1x1 convolutions."""

from typing import Any

import torch
from torch import Tensor, nn

from pasd_tiny.data import Crops
from pasd_tiny.networks import build_vae
from pasd_tiny.training import averaged_weights, checkpoint_path, part


def normalised_vae(seed: int, device: torch.device) -> Any:
    """The averaged VAE of stage `vae`, normalised, with the measured scaling factor, frozen.

    Trained freely, a channel of the latents may be twenty times larger than another; noise would drown the small one
    and 8-bit weights would resolve neither alike.
    """
    vae = build_vae()
    vae.load_state_dict(part(averaged_weights("vae"), "vae"))
    vae.eval().requires_grad_(False).to(device)
    images, _ = Crops(torch.Generator().manual_seed(seed)).clean(64, 96)
    images = images.to(device) * 2 - 1
    _normalise(vae, vae.encode(images).latent_dist.mode())
    deviation = vae.encode(images).latent_dist.mode().std()
    vae.register_to_config(scaling_factor=round(1 / float(deviation), 5))
    return vae


def trained_vae(seed: int, device: torch.device) -> Any:
    """The normalised VAE with the decoder of the last stage that trained one."""
    vae = normalised_vae(seed, device)
    for stage in ("finetune", "decoder"):
        if checkpoint_path(stage).exists():
            weights = averaged_weights(stage)
            for name, module in (encoder_modules(vae) | decoder_modules(vae)).items():
                if values := part(weights, name):
                    module.load_state_dict(values)
            break
    return vae


def encoder_modules(vae: Any) -> dict[str, nn.Module]:
    """The half of the VAE that turns pictures into latents."""
    return {"encoder": vae.encoder, "quant_conv": vae.quant_conv}


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
