"""Stage `evaluate`: the exported model on the held-out photographs, against bicubic and against the VAE alone."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pasd_tiny.data import ADDED_PROMPT
from pasd_tiny.networks import TILE, VAE_FACTOR
from sdconvert.assets import HELD_OUT, photograph_path
from sdconvert.io.degradation import FACTOR, crop_to_multiple, degrade, enlarge
from sdconvert.io.images import read_image, write_png
from sdconvert.metrics import psnr_y, ssim_y
from sdconvert.pipelines.color import wavelet_color_fix
from sdconvert.pipelines.pasd import PASDPipeline

PROMPTS = {"chelsea": "a photo of a cat", "china": "a photo of a temple"}
_MULTIPLE = FACTOR * VAE_FACTOR


@dataclass
class Case:
    """A held-out photograph and what the degradation leaves of it."""

    name: str
    full: Tensor
    low: Tensor


def evaluate(folder: Path, steps: list[int], pictures: Path | None) -> None:
    """Print PSNR-Y and SSIM of each held-out photograph; write the pictures if asked to.

    "fixed" is the result with PASD's wavelet colour fix, which takes the colours from the enlarged input.
    """
    pipeline = PASDPipeline.from_pretrained(folder)
    for name in HELD_OUT:
        full = crop_to_multiple(read_image(photograph_path(name)), _MULTIPLE)
        case = Case(name, full, degrade(full, 0))
        _report(case, "bicubic", enlarge(case.low), pictures)
        _report(case, "vae", reconstruct(pipeline, full), pictures)
        for count in steps:
            started = time.monotonic()
            prompt = PROMPTS[name] + ADDED_PROMPT
            image = pipeline(case.low, prompt=prompt, num_inference_steps=count, latent_tile=TILE)
            _report(case, f"{count} steps", image, pictures, time.monotonic() - started)
            fixed = wavelet_color_fix(image[None], enlarge(case.low)[None])[0]
            _report(case, f"{count} fixed", fixed, pictures)


@torch.no_grad()
def reconstruct(pipeline: PASDPipeline, image: Tensor) -> Tensor:
    """What the autoencoder alone makes of a photograph (3, H, W) in [0, 1]."""
    latents = pipeline.vae.encode(image[None] * 2 - 1).latent_dist.mode()
    decoded: Tensor = pipeline.vae.decode(latents).sample[0]
    return (decoded / 2 + 0.5).clamp(0, 1)


def _report(case: Case, label: str, image: Tensor, pictures: Path | None, seconds: float = 0.0) -> None:
    figures = f"{psnr_y(case.full, image):.2f} dB PSNR-Y, {ssim_y(case.full, image):.4f} SSIM"
    print(
        f"{case.name:8} {label:9} {figures}" + (f", {seconds:.1f} s" if seconds else ""),
        flush=True,
    )
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        write_png(image, pictures / f"{case.name}-{label.replace(' ', '-')}.png")
        write_png(case.full, pictures / f"{case.name}-full.png")
