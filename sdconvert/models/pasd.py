"""PASD (Pixel-Aware Stable Diffusion, Yang et al. 2023, arXiv:2308.14469): build, load and save its two networks.

Both are stock diffusers models with a plugin attached; their state_dicts have exactly the keys of the original ones.
The two variants of the UNet have the same config: only the keys of the weights tell them apart.
"""

import difflib
import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from sdconvert.errors import CheckpointError
from sdconvert.io.files import write_json_atomic
from sdconvert.io.tensors import load_tensors, save_tensors, tensor_shapes
from sdconvert.io.weights_index import weights_file
from sdconvert.models.config_json import making_model, read_config
from sdconvert.models.controlnet import ConditioningPlugin
from sdconvert.models.pixel_attention import LightPixelAttentionPlugin, PixelAttentionPlugin

Variant = Literal["full", "light"]

# A part of a key that only this variant has.
_VARIANT_KEYS: dict[Variant, str] = {"full": "pixel_attentions", "light": "attn2_plus"}
_PLUGIN_NAME = "pasd"
_CONTROLNET_EXTRAS = {"return_rgbs": True, "use_rrdb": False}
_SHOWN = 10


def build_pasd(
    unet_config: Mapping[str, Any], controlnet_config: Mapping[str, Any], variant: Variant = "full"
) -> tuple[UNet2DConditionModel, ControlNetModel]:
    """Build an untrained PASD in evaluation mode.

    Args:
        unet_config: Of `UNet2DConditionModel`; keys that are left out take diffusers' defaults.
        controlnet_config: Of `ControlNetModel`, with PASD's `return_rgbs` (True) and `use_rrdb` (False) besides.
        variant: Pixel transformers in all up blocks, or attention to pixels inside the text transformers.

    Returns:
        The UNet and the ControlNet. `controlnet(...)` returns `(rgbs, down, mid)`; see `ConditioningPlugin`.

    Raises:
        CheckpointError: A config has unknown keys or makes no model.
        UnsupportedModelError: The UNet's up blocks cannot take the variant.
    """
    return _build_unet(unet_config, variant).eval(), _build_controlnet(controlnet_config).eval()


def build_like_pasd(config: Mapping[str, Any], keys: Iterable[str]) -> nn.Module | None:
    """Build the untrained UNet or ControlNet that a config and the names of weights are of, if it is one of PASD.

    Args:
        config: As in `config.json`; PASD's names the stock classes.
        keys: Of the weights.

    Raises:
        CheckpointError: As `build_pasd`.
        UnsupportedModelError: As `build_pasd`.
    """
    if config.keys() & _CONTROLNET_EXTRAS.keys():
        return _build_controlnet(config)
    variants = _variants(keys)
    return _build_unet(config, variants[0]) if len(variants) == 1 else None


def load_pasd(folder: Path | str) -> tuple[UNet2DConditionModel, ControlNetModel]:
    """Load PASD from the original layout: `unet/` and `controlnet/`, each with `config.json` and weights.

    Args:
        folder: A PASD checkpoint.

    Returns:
        The UNet and the ControlNet in float32 and evaluation mode.

    Raises:
        CheckpointError: Something is missing or damaged, or weights and config do not fit each other exactly.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"`{folder}` is no folder", hint="name the folder that holds unet/ and controlnet/")
    weights = {part: weights_file(folder / part) for part in ("unet", "controlnet")}
    variant = _variant(weights["unet"])
    with torch.device("meta"):
        unet = _build_unet(read_config(folder / "unet" / "config.json"), variant)
        controlnet = _build_controlnet(read_config(folder / "controlnet" / "config.json"))
    _load_weights(unet, weights["unet"])
    _load_weights(controlnet, weights["controlnet"])
    return unet.eval(), controlnet.eval()


def save_pasd(unet: UNet2DConditionModel, controlnet: ControlNetModel, folder: Path | str) -> None:
    """Write PASD in the original layout, as safetensors.

    Raises:
        EnvironmentProblem: The disk is full.
    """
    for part, model in (("unet", unet), ("controlnet", controlnet)):
        target = Path(folder) / part
        target.mkdir(parents=True, exist_ok=True)
        save_tensors(model.state_dict(), target / "diffusion_pytorch_model.safetensors")
        write_json_atomic(json.loads(model.to_json_string()), target / "config.json")


def _build_unet(config: Mapping[str, Any], variant: Variant) -> UNet2DConditionModel:
    unet: UNet2DConditionModel = _from_config(UNet2DConditionModel, config)
    {"full": PixelAttentionPlugin, "light": LightPixelAttentionPlugin}[variant](_PLUGIN_NAME, unet)
    return unet


def _build_controlnet(config: Mapping[str, Any]) -> ControlNetModel:
    extras = {key: config.get(key, default) for key, default in _CONTROLNET_EXTRAS.items()}
    stock = {key: value for key, value in config.items() if key not in extras}
    if len(config.get("conditioning_embedding_out_channels", "ab")) < 2:
        raise CheckpointError("ControlNetModel: conditioning_embedding_out_channels needs at least two widths")
    controlnet: ControlNetModel = _from_config(ControlNetModel, stock)
    controlnet.register_to_config(**extras)  # type: ignore[no-untyped-call]
    ConditioningPlugin(_PLUGIN_NAME, controlnet, **extras)
    return controlnet


def _from_config(cls: type[nn.Module], config: Mapping[str, Any]) -> Any:
    known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    named = config.get("_class_name", cls.__name__)
    if named != cls.__name__:
        raise CheckpointError(f"the config is one of {named}, not of {cls.__name__}", hint="name PASD's own folders")
    # Keys with an underscore are diffusers' notes about the file.
    if unknown := [key for key in config if not key.startswith("_") and key not in known]:
        nearest = difflib.get_close_matches(unknown[0], known, 1, cutoff=0)
        raise CheckpointError(
            f"config of {cls.__name__}: unknown {_listed(unknown)}", hint=f"nearest known key: `{nearest[0]}`"
        )
    with making_model(f"config of {cls.__name__}", "model"):
        return cls(**{key: value for key, value in config.items() if not key.startswith("_")})


def _variant(path: Path) -> Variant:
    keys = tensor_shapes(path)
    found = _variants(keys)
    if len(found) != 1:
        parts = " and ".join(f"`{part}`" for part in _VARIANT_KEYS.values())
        raise CheckpointError(
            f"`{path}` is no PASD UNet: its {len(keys)} keys hold {'both' if found else 'neither'} of {parts}",
            hint="a plain Stable Diffusion UNet has no pixel attention; name a PASD checkpoint",
        )
    return found[0]


def _variants(keys: Iterable[str]) -> list[Variant]:
    every = list(keys)
    return [variant for variant, part in _VARIANT_KEYS.items() if any(f".{part}." in key for key in every)]


def _load_weights(model: nn.Module, path: Path) -> None:
    """Put the weights of a file into a model on the meta device, in float32."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = tensor_shapes(path)
    shapes = [
        f"{key} is {found[key]}, not {expected[key]}"
        for key in expected.keys() & found.keys()
        if found[key] != expected[key]
    ]
    problems = [
        f"{len(keys)} {what}: {_listed(keys)}"
        for what, keys in (
            ("missing", sorted(expected.keys() - found.keys())),
            ("unexpected", sorted(found.keys() - expected.keys())),
            ("of another shape", sorted(shapes)),
        )
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"the weights in `{path}` do not fit the config beside them: {'; '.join(problems)}",
            hint="config.json and weights must come from the same checkpoint",
        )
    # Copied, not assigned: tensors that map the file follow its alignment, and kernels round differently by alignment.
    tensors = {name: tensor.to(torch.float32, copy=True) for name, tensor in load_tensors(path).items()}
    model.load_state_dict(tensors, assign=True)


def _listed(items: Iterable[str]) -> str:
    names = list(items)
    return ", ".join(names[:_SHOWN]) + (f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
