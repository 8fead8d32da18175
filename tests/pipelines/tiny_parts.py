"""Parts of small models that several fixtures are made of."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig

# Of a tokenizer with every byte, alone and at the end of a word, and the two marks.
BYTES: dict[str, Any] = {
    "vocab_size": 514,
    "max_position_embeddings": 16,
    "bos_token_id": 512,
    "eos_token_id": 513,
    "pad_token_id": 513,
}


def vae(*widths: int) -> AutoencoderKL:
    """An autoencoder that halves the picture between its blocks."""
    model: AutoencoderKL = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        norm_num_groups=4,
    )
    return model.eval()


def text_config(width: int, heads: int = 2, layers: int = 2, **others: Any) -> CLIPTextConfig:
    """CLIP's text encoder, small."""
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        **others,
    )


def without_zeros(model: Any) -> Any:
    """The model with random weights where training starts from zero, which would switch the branch off."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model
