"""The embedded model: a real diffusers folder of small size that beats bicubic on photographs it never saw."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from sdconvert import load_pasd
from sdconvert.assets import HELD_OUT, asset_path, assets, photograph_path, photographs
from sdconvert.errors import UsageError
from sdconvert.io.degradation import crop_to_multiple, degrade, enlarge
from sdconvert.io.images import read_image
from sdconvert.io.tensors import load_tensors
from sdconvert.metrics import psnr_y, ssim_y
from sdconvert.pipelines.pasd import PASDPipeline

MIB = 2**20
PROMPTS = {"chelsea": "a photo of a cat", "china": "a photo of a temple"}
ADDED_PROMPT = ", clean, high-resolution, 8k"
STEPS = 4
GAIN_DB = 0.5


@pytest.fixture(scope="module")
def folder() -> Path:
    return asset_path("pasd_tiny")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> PASDPipeline:
    return PASDPipeline.from_pretrained(folder)


def sample(pipeline: PASDPipeline, low: Tensor, prompt: str, steps: int = STEPS) -> Tensor:
    return pipeline(
        low, prompt=prompt, num_inference_steps=steps, latent_tile=pipeline.unet.config.sample_size, color_fix=True
    )


def test_folder_and_photographs_stay_small(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 12 * MIB
    assert sum(path.stat().st_size for path in photographs().values()) < 2.5 * MIB


def test_index_names_every_part_and_every_part_is_there(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    parts = {name for name in index if not name.startswith("_")}
    assert parts == {path.name for path in folder.iterdir() if path.is_dir()}


def test_stock_classes_load_the_stock_parts(folder: Path) -> None:
    for model_class, part in ((AutoencoderKL, "vae"), (CLIPTextModel, "text_encoder")):
        _, keys = model_class.from_pretrained(folder / part, local_files_only=True, output_loading_info=True)
        assert not keys["missing_keys"] and not keys["unexpected_keys"], part
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    scheduler.set_timesteps(STEPS)
    assert scheduler.timesteps[0] == 999


def test_tokenizer_is_clips_with_fewer_merges(folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    tokens = tokenizer("a photo of a cat").input_ids
    assert tokens[1:5] == [320, 1125, 539, 320]  # the ids of the full vocabulary, which numbers merges by frequency
    assert (tokens[0], tokens[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.unk_token_id not in tokenizer("Zürich 2024 — naïve façade 鳥").input_ids[1:-1]


def test_networks_have_several_heads_and_pixel_attention_in_every_up_block(folder: Path) -> None:
    unet, controlnet = load_pasd(folder)
    assert all(heads > 1 for heads in unet.config.attention_head_dim)
    assert unet.config.down_block_types == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert all(len(block.pixel_attentions) == len(block.resnets) for block in unet.up_blocks)
    assert unet.config.in_channels == controlnet.config.in_channels


def test_weights_are_finite_halves_and_no_zero_convolution_stayed_zero(folder: Path) -> None:
    for part in ("unet", "controlnet", "vae"):
        weights = load_tensors(folder / part / "diffusion_pytorch_model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float16}
        assert all(weight.isfinite().all() for weight in weights.values())
        assert all(weight.any() for name, weight in weights.items() if name.startswith("controlnet_"))


def test_latents_have_unit_variance(pipeline: PASDPipeline) -> None:
    for name in HELD_OUT:
        image = crop_to_multiple(read_image(photograph_path(name)), 32)
        with torch.no_grad():
            mean = pipeline.vae.encode(image[None] * 2 - 1).latent_dist.mode()
        assert 0.6 < (mean * pipeline.vae.config.scaling_factor).std() < 1.6


def test_text_has_an_effect(pipeline: PASDPipeline) -> None:
    low = degrade(crop_to_multiple(read_image(photograph_path("chelsea")), 16)[:, :128, 128:256], 0)
    first, second = (sample(pipeline, low, prompt, steps=1) for prompt in ("a photo of a cat", "stars at night"))
    assert (first - second).abs().max() > 1e-4


@pytest.fixture(scope="module")
def restored(pipeline: PASDPipeline) -> tuple[Tensor, Tensor]:
    """A part of a held-out photograph, of more than one tile, and what is made of its low resolution."""
    full = crop_to_multiple(read_image(photograph_path("chelsea")), 16)[:, :192, :224]
    return full, sample(pipeline, degrade(full, 0), PROMPTS["chelsea"] + ADDED_PROMPT)


def test_a_part_of_a_held_out_photograph_gains_over_bicubic(restored: tuple[Tensor, Tensor]) -> None:
    assert_gain(*restored)


@pytest.mark.slow
@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_photograph_gains_over_bicubic(pipeline: PASDPipeline, name: str) -> None:
    full = crop_to_multiple(read_image(photograph_path(name)), 16)
    assert_gain(full, sample(pipeline, degrade(full, 0), PROMPTS[name] + ADDED_PROMPT))


def assert_gain(full: Tensor, result: Tensor) -> None:
    bicubic = enlarge(degrade(full, 0))
    assert psnr_y(full, result) > psnr_y(full, bicubic) + GAIN_DB
    assert ssim_y(full, result) > ssim_y(full, bicubic)


def test_seams_of_tiles_do_not_show(restored: tuple[Tensor, Tensor]) -> None:
    full, result = restored
    error = (result - full).abs().mean(0)
    # Tiles of 128 pixels overlap by 32: the step of the error across a seam must be as anywhere else.
    steps = error.diff(dim=1).abs().mean(0)
    assert steps[95:129].max() < 2 * steps.median()


@pytest.mark.parametrize("find", [asset_path, photograph_path])
def test_unknown_name_is_refused_with_the_nearest(find: Callable[[str], Path]) -> None:
    near = {asset_path: ("pasd_tny", "pasd_tiny"), photograph_path: ("chelse", "chelsea")}
    wrong, right = near[find]  # type: ignore[index]
    with pytest.raises(UsageError, match=wrong) as refused:
        find(wrong)
    assert right in str(refused.value)


@given(st.sampled_from(sorted(assets()) + sorted(photographs())))
def test_every_listed_name_is_found(name: str) -> None:
    assert (asset_path if name in assets() else photograph_path)(name).exists()


def test_every_photograph_has_its_licence_beside_it() -> None:
    text = (asset_path("photos") / "LICENSES.md").read_text()
    assert all(path.name in text for path in photographs().values())
