"""Read one model folder of any registered family: `config.json` names the class, the weights must fit exactly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdconvert.adapters.base import AdapterRegistry
from sdconvert.errors import CheckpointError, UnsupportedModelError
from sdconvert.io.tensors import load_tensors, weights_file
from sdconvert.models.config_json import making_model, read_config

_SHOWN = 5
_OLD_PREFIX = "text_model."
_POSITIONS = "position_ids"  # 0, 1, 2, …: older files hold them, today's models make them


def load_model(folder: Path) -> nn.Module:
    """Load a model in float32 and evaluation mode.

    Args:
        folder: Holds `config.json` and weights, as diffusers and transformers write them.

    Raises:
        UnsupportedModelError: No family covers the class that the config names.
        CheckpointError: Something is missing or damaged, or config and weights do not fit each other.
    """
    config = read_config(folder / "config.json")
    name = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    classes = {origin.__name__: origin for origin in AdapterRegistry.entries()}
    if name not in classes:
        raise UnsupportedModelError(
            f"`{folder}` holds a {name or 'model of unnamed class'}; {AdapterRegistry.known()}",
            hint=f"register a family for it: `@AdapterRegistry.register({name or 'TheClass'})`",
        )
    with making_model(f"the config in `{folder}`", name):
        model = _build(classes[name], config)
    stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
    path = weights_file(folder, stem)
    tensors = {key: tensor.to(torch.float32, copy=True) for key, tensor in load_tensors(path).items()}
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    tensors = {_name_of_today(key, expected): tensor for key, tensor in tensors.items() if not key.endswith(_POSITIONS)}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if odd := sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)):
        raise CheckpointError(
            f"`{path}` does not fit a {name}: {len(odd)} tensors are missing, unexpected or of another shape, "
            f"{', '.join(odd[:_SHOWN])}",
            hint="config.json and weights must come from the same checkpoint; PASD is loaded as a pipeline folder",
        )
    model.load_state_dict(tensors)
    return model.eval()


def _build(cls: Any, config: dict[str, Any]) -> nn.Module:
    model: nn.Module = cls.from_config(config) if "_class_name" in config else cls(cls.config_class.from_dict(config))
    return model


def _name_of_today(key: str, expected: Mapping[str, Any]) -> str:
    """Text encoders saved by transformers before 5, all published ones, keep everything below `text_model`."""
    stripped = key.removeprefix(_OLD_PREFIX)
    return stripped if key not in expected and stripped in expected else key
