"""The encoding half of an `AutoencoderKL` as a model of its own: a phone runs the two halves as two graphs."""

from functools import wraps
from typing import Any, Self

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor


class AutoencoderKLEncoder(AutoencoderKL):
    """An `AutoencoderKL` without its decoder; config and names of weights are those of the whole."""

    # diffusers reads off the signature which keys of a config are its own.
    @wraps(AutoencoderKL.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.decoder, self.post_quant_conv

    @classmethod
    def of(cls, vae: AutoencoderKL) -> Self:
        """Copy the encoding half of a model, in evaluation mode and without gradients."""
        with torch.device("meta"):
            half: Any = cls.from_config(vae.config)
        weights = vae.state_dict()
        half.load_state_dict({name: weights[name].clone() for name in half.state_dict()}, assign=True)
        encoder: Self = half.eval().requires_grad_(False)
        return encoder

    def moments(self, sample: Tensor) -> Tensor:
        """Encode a picture (1, 3, H, W): mean and logarithmic variance of the latents, (1, 2 C, h, w)."""
        encoded: Tensor = self.encoder(sample)
        return encoded if self.quant_conv is None else self.quant_conv(encoded)
