"""A small PASD with random weights in the layout of a released one, and a picture for it."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from tiny_parts import BYTES, text_config, vae, without_zeros
from torch import Tensor, nn
from transformers import CLIPTextModel

from sdconvert.pipelines.pasd import PASDPipeline

WIDTHS = (16, 16, 32, 32)
DOWN_BLOCKS = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
COMMON = {
    "block_out_channels": WIDTHS,
    "down_block_types": DOWN_BLOCKS,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
}
HEADS = 2


@pytest.fixture(scope="session")
def pasd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PASD with an f=4 VAE and seeded random weights, no branch of which is zero."""
    folder = tmp_path_factory.mktemp("pasd")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        without_zeros(_unet()).save_pretrained(folder / "unet")
        controlnet = ControlNetModel(**COMMON, conditioning_embedding_out_channels=(8, 16, 32))
        controlnet.register_to_config(return_rgbs=False, use_rrdb=False)
        without_zeros(controlnet).save_pretrained(folder / "controlnet")
        without_zeros(vae(8, 16, 16)).save_pretrained(folder / "vae")
        text_encoder = CLIPTextModel(text_config(32, heads=4, **BYTES))
        without_zeros(text_encoder).save_pretrained(folder / "text_encoder")
    _write_tokenizer(folder / "tokenizer")
    DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False).save_pretrained(
        folder / "scheduler"
    )
    return folder


@pytest.fixture(scope="session")
def loaded(pasd_folder: Path) -> PASDPipeline:
    """The pipeline of `pasd_folder`, read once."""
    return PASDPipeline.from_pretrained(pasd_folder)


@pytest.fixture
def pipe(loaded: PASDPipeline) -> PASDPipeline:
    """A pipeline whose attributes a test may swap; the models are shared."""
    return copy.copy(loaded)


@pytest.fixture
def image() -> Tensor:
    """A smooth coloured picture, (3, 8, 12) in [0, 1]."""
    rows, columns = torch.linspace(0, 1, 8)[:, None], torch.linspace(0, 1, 12)
    return torch.stack([rows.expand(8, 12), columns.expand(8, 12), 0.5 + 0.5 * torch.sin(3 * (rows + columns))])


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Run the test without gradients."""
    with torch.no_grad():
        yield


def _unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(**COMMON, up_block_types=UP_BLOCKS, sample_size=8)
    for block in unet.up_blocks:
        width = block.resnets[0].out_channels
        skips = [resnet.in_channels for resnet in block.resnets]
        pixel_channels = [width] * len(skips)
        if hasattr(block, "attentions"):
            pixel_channels[-1] = skips[-1] - width
        block.pixel_attentions = nn.ModuleList(
            Transformer2DModel(
                HEADS, width // HEADS, in_channels=width, norm_num_groups=8, cross_attention_dim=channels
            )
            for channels in pixel_channels
        )
    return unet


def _write_tokenizer(folder: Path) -> None:
    """CLIP's byte-pair vocabulary without a merge: every byte, alone and at the end of a word."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 16,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
