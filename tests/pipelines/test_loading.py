"""A folder that is not what it should be is refused, with the part and what is wrong with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel

from sdconvert.errors import CheckpointError
from sdconvert.io.tensors import load_tensors, save_tensors
from sdconvert.pipelines.loading import load_auxiliaries


@pytest.fixture
def copy(pasd_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pasd_folder, tmp_path / "pasd")


def test_half_precision_weights_are_read_as_float32(copy: Path) -> None:
    original = load_auxiliaries(copy)
    AutoencoderKL.from_pretrained(copy / "vae").half().save_pretrained(copy / "vae")
    CLIPTextModel.from_pretrained(copy / "text_encoder").half().save_pretrained(copy / "text_encoder")
    halves = load_auxiliaries(copy)
    for name in ("vae", "text_encoder"):
        for tensor, half in zip(original[name].parameters(), halves[name].parameters(), strict=True):
            assert half.dtype == torch.float32
            assert torch.equal(half, tensor.half().float())


def test_weights_as_stable_diffusion_1_5_stores_them_are_read(copy: Path) -> None:
    """Its VAE has the attention's old names, its text encoder a buffer that is no weight any more."""
    original = load_auxiliaries(copy)
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    vae = load_tensors(file)
    for new, old in old_names.items():
        vae = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): tensor for name, tensor in vae.items()}
    save_tensors(vae, file)
    file = copy / "text_encoder" / "model.safetensors"
    positions = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    save_tensors({**load_tensors(file), **positions}, file)
    loaded = load_auxiliaries(copy)
    for name in ("vae", "text_encoder"):
        for tensor, other in zip(original[name].parameters(), loaded[name].parameters(), strict=True):
            assert torch.equal(tensor, other)


def _truncate(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _truncate_text(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _other_scheduler(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "NoScheduler"}))


def _broken_scheduler(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text("{")


def _missing_key(folder: Path) -> None:
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    del vae.quant_conv
    vae.save_pretrained(folder / "vae")


def _unexpected_key(folder: Path) -> None:
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    vae.more = torch.nn.Linear(2, 2)
    vae.save_pretrained(folder / "vae")


def _other_width(folder: Path) -> None:
    file = folder / "vae" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "block_out_channels": [8, 16, 24]}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "vae"), "lacks vae"),
        (lambda folder: (folder / "vae" / "config.json").unlink(), "cannot read .*vae"),
        (lambda folder: (folder / "tokenizer" / "vocab.json").unlink(), "cannot read .*tokenizer"),
        (_truncate, "vae/diffusion_pytorch_model.safetensors"),
        (_truncate_text, "text_encoder/model.safetensors"),
        (_other_scheduler, "NoScheduler"),
        (_broken_scheduler, "cannot read .*scheduler_config.json"),
        (_missing_key, "2 missing keys: quant_conv.bias, quant_conv.weight"),
        (_unexpected_key, "2 unexpected keys: more.bias, more.weight"),
        (_other_width, "vae"),
    ],
)
def test_a_damaged_folder_is_refused(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(CheckpointError, match=message):
        load_auxiliaries(copy)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="lacks unet, controlnet, vae"):
        load_auxiliaries(tmp_path)
