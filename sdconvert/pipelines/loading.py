"""Reading the parts of a diffusers folder that stock classes cover, strictly and without the network."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from sdconvert.errors import CheckpointError
from sdconvert.io.tensors import tensor_shapes, weights_file


def load_auxiliaries(folder: Path) -> dict[str, Any]:
    """VAE, text encoder, tokenizer and scheduler of `folder`, by argument name of the pipeline, in float32.

    Raises:
        CheckpointError: A part is missing or damaged, or its weights do not fit its config.
    """
    names = ("unet", "controlnet", "vae", "text_encoder", "tokenizer", "scheduler")
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(
            f"{folder} is no PASD pipeline folder: it lacks {', '.join(missing)}",
            hint="copy the missing folders from the Stable Diffusion model that PASD was trained on",
        )
    return {
        "vae": _load_strictly(
            AutoencoderKL, weights_file(folder / "vae"), torch_dtype=torch.float32, low_cpu_mem_usage=False
        ),
        "text_encoder": _load_strictly(
            CLIPTextModel, weights_file(folder / "text_encoder", "model"), dtype=torch.float32
        ),
        "tokenizer": _load(CLIPTokenizer, folder / "tokenizer"),
        "scheduler": load_scheduler(folder),
    }


def load_scheduler(folder: Path) -> Any:
    """The sampler of a diffusers folder, of the class that its config names.

    Raises:
        CheckpointError: The config is missing, damaged, or names no scheduler of diffusers.
    """
    return _load(_scheduler_class(folder / "scheduler"), folder / "scheduler")


def _load_strictly(model_class: Any, weights: Path, **options: Any) -> Any:
    """The stock loaders leave a missing weight random and drop an unexpected one, with a warning only."""
    tensor_shapes(weights)  # a damaged file is refused here, by name
    folder = weights.parent
    with _without_progress_bar():
        model, keys = _load(model_class, folder, output_loading_info=True, **options)
    for problem in ("missing_keys", "unexpected_keys"):
        names = sorted(keys[problem])
        if names:
            shown = ", ".join(names[:8]) + " …" * (len(names) > 8)
            raise CheckpointError(
                f"{folder} has {len(names)} {problem.replace('_', ' ')}: {shown}",
                hint="its weights and its config.json belong to different models",
            )
    return model


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar of its own for every model, into the middle of ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _load(loadable: Any, folder: Path, **options: Any) -> Any:
    try:
        return loadable.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot read {folder}: {error}", hint="is the download or the copy complete?") from error


def _scheduler_class(folder: Path) -> Any:
    config = folder / "scheduler_config.json"
    try:
        name = json.loads(config.read_text(encoding="utf-8")).get("_class_name", "")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {config}: {error}", hint="is the copy complete?") from error
    if not hasattr(diffusers, name):
        raise CheckpointError(f"{config} names the scheduler class {name!r}, which diffusers does not have")
    return getattr(diffusers, name)
