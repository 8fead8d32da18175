"""A model's `config.json`: read as an object, and made into a model, or an error that names it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdconvert.errors import CheckpointError


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: It is missing or damaged, or holds something else.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"`{path}` cannot be read: {error}", hint="name the folder of a model, or copy it again"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"`{path}` holds a {type(config).__name__}, not an object", hint="copy it again")
    return config


@contextmanager
def making_model(config: str, model: str) -> Iterator[None]:
    """Turn what the constructors of diffusers and transformers raise for a bad config into one error.

    Args:
        config: What the message calls the config.
        model: What is made of it.

    Raises:
        CheckpointError: The config makes no such model.
    """
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError, ZeroDivisionError, NotImplementedError) as error:
        raise CheckpointError(f"{config} makes no {model}: {error}", hint="check its config.json") from error
