"""Reading what stock loaders read of a diffusers folder besides weights: schedulers and tokenizers, from the disk."""

from pathlib import Path
from typing import Any

import diffusers
from transformers import AutoTokenizer

from sdconvert.errors import CheckpointError
from sdconvert.models.config_json import read_config


def load_scheduler(folder: Path) -> Any:
    """The sampler of a diffusers folder, of the class that its config names.

    Raises:
        CheckpointError: The config is missing, damaged, or names no scheduler of diffusers.
    """
    config = folder / "scheduler" / "scheduler_config.json"
    name = read_config(config).get("_class_name", "")
    if not hasattr(diffusers, name):
        raise CheckpointError(
            f"`{config}` names the scheduler class {name!r}, which diffusers does not have",
            hint="name one of diffusers' schedulers there",
        )
    return _load(getattr(diffusers, name), config.parent)


def load_tokenizer(folder: Path) -> Any:
    """A tokenizer, of the class that its config names.

    Args:
        folder: Its own.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    return _load(AutoTokenizer, folder)


def _load(loadable: Any, folder: Path) -> Any:
    try:
        return loadable.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, LookupError, RuntimeError) as error:
        raise CheckpointError(f"cannot read `{folder}`: {error}", hint="is the copy complete?") from error
