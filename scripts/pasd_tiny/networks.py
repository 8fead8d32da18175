"""The sizes of `pasd_tiny` and the construction of its untrained parts."""

from dataclasses import dataclass
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdconvert.models.pasd import build_pasd

LATENT_CHANNELS = 8
VAE_FACTOR = 4
TILE = 32  # latent side of one tile: 128 pixels
_TEXT_WIDTH = 64

_VAE: dict[str, Any] = {
    "block_out_channels": (24, 48, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "latent_channels": LATENT_CHANNELS,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": TILE * VAE_FACTOR,
}
_DOWN: dict[str, Any] = {
    "in_channels": LATENT_CHANNELS,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "block_out_channels": (32, 64, 64, 64),
    "attention_head_dim": (
        2,
        4,
        4,
        4,
    ),  # diffusers means the number of heads; each is 16 wide
    "layers_per_block": 1,
    "cross_attention_dim": _TEXT_WIDTH,
    "norm_num_groups": 8,
}
UNET = _DOWN | {
    "sample_size": TILE,
    "out_channels": LATENT_CHANNELS,
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
CONTROLNET = _DOWN | {
    "conditioning_embedding_out_channels": (16, 32, 64),
    "return_rgbs": True,
    "use_rrdb": False,
}


@dataclass
class Networks:
    """The three networks that the diffusion stages train."""

    unet: Any
    controlnet: Any
    text_encoder: CLIPTextModel

    def named(self) -> dict[str, nn.Module]:
        """Name to network, as in checkpoints and in the exported folder."""
        return {
            "unet": self.unet,
            "controlnet": self.controlnet,
            "text_encoder": self.text_encoder,
        }


def build_vae() -> Any:
    """The untrained autoencoder, factor 4; its scaling factor is 1, since `latents` normalises its weights."""
    return AutoencoderKL(**_VAE, scaling_factor=1.0)  # type: ignore[no-untyped-call]


def build_networks(tokenizer: CLIPTokenizer) -> Networks:
    """The untrained UNet, ControlNet and text encoder."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_TEXT_WIDTH,
        intermediate_size=2 * _TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=_TEXT_WIDTH,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet, controlnet = build_pasd(UNET, CONTROLNET, "full")
    return Networks(unet, controlnet, CLIPTextModel(config))


def build_scheduler() -> Any:
    """Deterministic sampler for few steps that begins at timestep 999, where noise has a deviation of 0.2.

    With so little noise the sample carries the picture itself past the normalization layers, which would lose its
    means, and velocity, as a correction of the sample (Salimans and Ho 2022), is all that is left to predict.
    """
    return DDIMScheduler(  # type: ignore[no-untyped-call]
        num_train_timesteps=1000,
        beta_start=6.5e-6,
        beta_end=9.1e-5,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
