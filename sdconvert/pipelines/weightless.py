"""PASD without weights: all that a sampling loop needs of a checkpoint where graphs answer in place of its models."""

import shutil
from pathlib import Path
from typing import Any

from sdconvert.models.config_json import read_config
from sdconvert.pipelines.layouts import build_on_meta
from sdconvert.pipelines.loading import load_scheduler, load_tokenizer
from sdconvert.pipelines.pasd import PASDPipeline

# By the pipeline's names. What tells the variants of PASD's UNet apart computes inside the graph.
_FAMILIES = {
    "unet": "UNet2DConditionModel",
    "controlnet": "PASD ControlNet",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
}
_WHOLE = ("scheduler", "tokenizer")


def copy_without_weights(model: Path, target: Path) -> None:
    """Copy what `weightless_pipeline` reads of a diffusers folder.

    Args:
        model: The diffusers folder.
        target: A folder that does not exist yet.
    """
    for part in _WHOLE:
        shutil.copytree(model / part, target / part, ignore=shutil.ignore_patterns(".*"))
    for part in _FAMILIES:
        (target / part).mkdir(parents=True)
        shutil.copyfile(model / part / "config.json", target / part / "config.json")


def weightless_pipeline(folder: Path) -> PASDPipeline:
    """Build the pipeline of a folder that `copy_without_weights` made; every model of it has to be replaced.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    configs = {name: read_config(folder / name / "config.json") for name in _FAMILIES}
    models: dict[str, Any] = {name: build_on_meta(family, configs[name]) for name, family in _FAMILIES.items()}
    return PASDPipeline(**models, scheduler=load_scheduler(folder), tokenizer=load_tokenizer(folder / "tokenizer"))
