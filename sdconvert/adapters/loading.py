"""Read one model of any registered family, or of PASD: its config names the class, the weights must fit exactly."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sdconvert.adapters.base import AdapterRegistry
from sdconvert.errors import CheckpointError, UnsupportedModelError
from sdconvert.io.tensors import load_tensors
from sdconvert.io.weights_index import weights_file
from sdconvert.models.config_json import making_model, read_config
from sdconvert.models.pasd import build_like_pasd

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
    stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
    path = weights_file(folder, stem)
    return make_model(config, load_tensors(path), path)


def make_model(config: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> nn.Module:
    """Make a model in float32 and evaluation mode.

    Args:
        config: As in `config.json`; it names the class.
        weights: The model's, of any type; they are copied.
        path: Of the weights, for messages.

    Raises:
        UnsupportedModelError: No family covers the class that the config names.
        CheckpointError: The config makes no model, or another than the weights'.
    """
    model = _build(config, weights.keys(), path.parent)
    load_weights(model, weights, path)
    return model.eval()


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy weights of any type into a model, strictly.

    Args:
        model: As it is today, whatever version of transformers wrote the weights.
        weights: The model's.
        path: Of the weights, for messages.

    Raises:
        CheckpointError: They are not exactly those of the model, which keeps its own.
    """
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    weights = {_name_of_today(key, expected): tensor for key, tensor in weights.items() if not key.endswith(_POSITIONS)}
    found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    if odd := sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)):
        raise CheckpointError(
            f"`{path}` does not fit a {type(model).__name__}: {len(odd)} tensors are missing, unexpected or of another "
            f"shape, {', '.join(odd[:_SHOWN])}",
            hint="config.json and weights must come from the same checkpoint, and agree on the heads",
        )
    # Copied into memory of the model: tensors that map the file follow its alignment, and kernels round by alignment.
    model.load_state_dict(weights)


def _build(config: Mapping[str, Any], keys: Collection[str], folder: Path) -> nn.Module:
    if (pasd := build_like_pasd(config, keys)) is not None:
        return pasd
    name = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    classes: dict[str, Any] = {origin.__name__: origin for origin in AdapterRegistry.entries()}
    if name not in classes:
        raise UnsupportedModelError(
            f"`{folder}` holds a {name or 'model of unnamed class'}; {AdapterRegistry.known()}",
            hint=f"register a family for it: `@AdapterRegistry.register({name or 'TheClass'})`",
        )
    cls = classes[name]
    with making_model(f"the config in `{folder}`", name):
        model: nn.Module = (
            cls.from_config(config) if "_class_name" in config else cls(cls.config_class.from_dict(config))
        )
    return model


def _name_of_today(key: str, expected: Mapping[str, Any]) -> str:
    """Text encoders saved by transformers before 5, all published ones, keep everything below `text_model`."""
    stripped = key.removeprefix(_OLD_PREFIX)
    return stripped if key not in expected and stripped in expected else key
