"""A pipeline's folder that is not what it should be is refused, with the part and what is wrong with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from sdconvert.errors import CheckpointError, MissingModelError, SdconvertError, UnsupportedModelError
from sdconvert.pipelines.pasd import PASDPipeline


@pytest.fixture
def copy(pasd_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pasd_folder, tmp_path / "pasd")


def test_half_precision_weights_are_read_as_float32(copy: Path, loaded: PASDPipeline) -> None:
    AutoencoderKL.from_pretrained(copy / "vae").half().save_pretrained(copy / "vae")
    CLIPTextModel.from_pretrained(copy / "text_encoder").half().save_pretrained(copy / "text_encoder")
    halves = PASDPipeline.from_pretrained(copy)
    for name in ("vae", "text_encoder"):
        for tensor, half in zip(getattr(loaded, name).parameters(), getattr(halves, name).parameters(), strict=True):
            assert half.dtype == torch.float32
            assert torch.equal(half, tensor.half().float())


def test_folders_that_no_pipeline_takes_are_passed_by(copy: Path) -> None:
    shutil.copytree(copy / "text_encoder", copy / "safety_checker")
    assert not hasattr(PASDPipeline.from_pretrained(copy), "safety_checker")


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _rewrite(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _missing_key(folder: Path) -> None:
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    del vae.quant_conv
    vae.save_pretrained(folder / "vae")


def _unexpected_key(folder: Path) -> None:
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    vae.more = torch.nn.Linear(2, 2)
    vae.save_pretrained(folder / "vae")


def _stock_unet(folder: Path) -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    unet.save_pretrained(folder / "unet")


SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "vae"), MissingModelError, "needs vae; loaded: controlnet, scheduler"),
        (lambda folder: (folder / "vae/config.json").unlink(), UnsupportedModelError, "no known AutoencoderKL"),
        (lambda folder: (folder / "tokenizer/vocab.json").unlink(), CheckpointError, "cannot read .*tokenizer"),
        (
            lambda folder: _truncate(folder / "vae/diffusion_pytorch_model.safetensors"),
            CheckpointError,
            "vae/diffusion_pytorch_model.safetensors",
        ),
        (
            lambda folder: _truncate(folder / "text_encoder/model.safetensors"),
            CheckpointError,
            "text_encoder/model.safetensors",
        ),
        (lambda folder: _rewrite(folder / SCHEDULER, _class_name="NoScheduler"), CheckpointError, "NoScheduler"),
        (lambda folder: (folder / SCHEDULER).write_text("{"), CheckpointError, "scheduler_config.json` cannot be read"),
        (lambda folder: _rewrite(folder / SCHEDULER, beta_schedule="no"), CheckpointError, "cannot read .*scheduler"),
        (_missing_key, CheckpointError, "2 missing: quant_conv.bias, quant_conv.weight"),
        (_unexpected_key, CheckpointError, "2 unexpected: more.bias, more.weight"),
        (lambda folder: _rewrite(folder / "vae/config.json", block_out_channels=[8, 16, 24]), CheckpointError, "vae"),
        (_stock_unet, UnsupportedModelError, "is a UNet2DConditionModel, the unet of PASDPipeline is a PASD UNet or"),
    ],
)
def test_a_damaged_folder_is_refused(
    copy: Path, damage: Callable[[Path], None], error: type[SdconvertError], message: str
) -> None:
    damage(copy)
    with pytest.raises(error, match=message) as caught:
        PASDPipeline.from_pretrained(copy)
    assert caught.value.hint


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds neither"):
        PASDPipeline.from_pretrained(tmp_path)
