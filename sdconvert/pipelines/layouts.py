"""What model a set of weights is, told by names and shapes alone: no weight is read.

A layout is known by a config, which builds it on the `meta` device; nothing is hard-coded but the configs that released
models share. A layout that is not known is compared with the nearest one, key by key.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, PixArtTransformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from sdconvert.errors import UnsupportedModelError
from sdconvert.models.config_json import making_model
from sdconvert.models.pasd import build_pasd
from sdconvert.pipelines.model_config import Shapes

_SHOWN = 4


@dataclass(frozen=True)
class Family:
    """A class of models.

    Attributes:
        role: What pipelines call a model of it.
        mark: A part of a key that every model of it has, and none of the families after it.
        build: Builds a model from a config.
        known: Configs of released models, by name.
        config_mark: A key of the config that only this family has.
        shallow: Changes of a config that make the model small, and leave its buffers that no file holds as they are.
    """

    role: str
    mark: str
    build: Callable[[Mapping[str, Any]], nn.Module]
    known: Mapping[str, Mapping[str, Any]]
    shallow: Mapping[str, Any] = field(default_factory=dict)
    config_mark: str = ""


def _diffusers(cls: Any) -> Callable[[Mapping[str, Any]], nn.Module]:
    def build(config: Mapping[str, Any]) -> nn.Module:
        model: nn.Module = cls.from_config(dict(config))
        return model

    return build


def _transformers(cls: Any, config_class: Any) -> Callable[[Mapping[str, Any]], nn.Module]:
    def build(config: Mapping[str, Any]) -> nn.Module:
        model: nn.Module = cls(config_class.from_dict(dict(config)))
        return model

    return build


def _pasd_unet(variant: Any) -> Callable[[Mapping[str, Any]], nn.Module]:
    return lambda config: build_pasd(config, {}, variant)[0]


def _pasd_controlnet(config: Mapping[str, Any]) -> nn.Module:
    return build_pasd({}, config)[1]


_SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
_SD21 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
_SDXL = {
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SDXL_UP = {"up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}
_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
_SMALL_CLIP = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "projection_dim": 8,
    "vocab_size": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_PIXART = {"sample_size": 64, "num_layers": 28, "attention_head_dim": 72, "num_attention_heads": 16}
_T5 = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu"}

# The marks are tried in this order: a ControlNet of PASD is a ControlNet too.
FAMILIES: dict[str, Family] = {
    "PASD UNet": Family("unet", ".pixel_attentions.", _pasd_unet("full"), {"PASD": _SD15}),
    "PASD light UNet": Family("unet", ".attn2_plus.", _pasd_unet("light"), {"PASD light": _SD15}),
    "PASD ControlNet": Family(
        "controlnet",
        "to_rgbs.",
        _pasd_controlnet,
        {"PASD": {"cross_attention_dim": 768}},
        config_mark="return_rgbs",  # without them, its keys are those of any ControlNet
    ),
    "ControlNetModel": Family(
        "controlnet",
        "controlnet_cond_embedding.",
        _diffusers(ControlNetModel),
        {"Stable Diffusion 1.5": _SD15, "Stable Diffusion 2.1": _SD21, "SDXL": _SDXL},
    ),
    "UNet2DConditionModel": Family(
        "unet",
        "up_blocks.0.resnets.0.time_emb_proj.",
        _diffusers(UNet2DConditionModel),
        {"Stable Diffusion 1.5": _SD15, "Stable Diffusion 2.1": _SD21, "SDXL": {**_SDXL, **_SDXL_UP}},
    ),
    "AutoencoderKL": Family("vae", "decoder.mid_block.", _diffusers(AutoencoderKL), {"Stable Diffusion": _VAE}),
    "PixArtTransformer2DModel": Family(
        "transformer",
        "adaln_single.",
        _diffusers(PixArtTransformer2DModel),
        {"PixArt-alpha 512": _PIXART, "PixArt-alpha 1024": {**_PIXART, "sample_size": 128}},
        {"num_layers": 1},
    ),
    "CLIPTextModelWithProjection": Family(
        "text_encoder_2",
        "text_projection.",
        _transformers(CLIPTextModelWithProjection, CLIPTextConfig),
        {"SDXL": _CLIP_G},
        _SMALL_CLIP,
    ),
    "CLIPTextModel": Family(
        "text_encoder",
        "embeddings.token_embedding.",
        _transformers(CLIPTextModel, CLIPTextConfig),
        {"Stable Diffusion 1.5": _CLIP_L, "Stable Diffusion 2.1": _CLIP_H},
        _SMALL_CLIP,
    ),
    "T5EncoderModel": Family(
        "text_encoder", "encoder.block.", _transformers(T5EncoderModel, T5Config), {"PixArt-alpha": _T5}
    ),
}


def find_family(shapes: Shapes, config: Mapping[str, Any]) -> str:
    """Name of the family that weights belong to, by the marks in their keys and their config.

    Raises:
        UnsupportedModelError: They belong to none.
    """
    matching = (
        name
        for name, family in FAMILIES.items()
        if (family.config_mark and family.config_mark in config) or any(family.mark in key for key in shapes)
    )
    found = next(matching, None)
    architectures = config.get("architectures") or [""]
    said = config.get("_class_name", architectures[0])
    if found is None:
        if any(key.startswith("model.diffusion_model.") for key in shapes):
            raise UnsupportedModelError(
                "this is a Stable Diffusion checkpoint in the original layout (`model.diffusion_model.…`)",
                hint="convert it once: diffusers.StableDiffusionPipeline.from_single_file(…).save_pretrained(folder)",
            )
        first = ", ".join(sorted(shapes)[:_SHOWN])
        raise UnsupportedModelError(
            f"{said or 'no known model'} has keys such as {first}; known families: {', '.join(FAMILIES)}",
            hint="give the weights of one of these models",
        )
    return found


def build_on_meta(family: str, config: Mapping[str, Any]) -> nn.Module:
    """Build a model of a family without memory for its weights; buffers that no file holds have their values.

    Raises:
        CheckpointError: The config makes no such model.
    """
    kind = FAMILIES[family]
    with making_model("the config", family):
        with torch.device("meta"):
            model = kind.build(config)
        _fill_unsaved(model, lambda: kind.build({**config, **kind.shallow}))
    return model


def recognized(family: str, shapes: Shapes) -> Mapping[str, Any]:
    """Config of the released model with exactly this layout.

    Raises:
        UnsupportedModelError: There is none; the message names the nearest and the keys that differ.
    """
    distances: list[tuple[int, str, str]] = []
    for name, config in FAMILIES[family].known.items():
        known = layout(build_on_meta(family, config))
        if known == shapes:
            return config
        differing = sum(known.get(key) != shapes.get(key) for key in known.keys() | shapes.keys())
        distances.append((differing, name, differences(known, shapes)))
    differing, nearest, what = min(distances)
    raise UnsupportedModelError(
        f"the weights are those of no known {family}; nearest is {nearest}, from which {differing} keys differ: {what}",
        hint="put the model's config.json beside the weights",
    )


def layout(model: nn.Module) -> Shapes:
    """Names and shapes of a model's state."""
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def differences(known: Shapes, found: Shapes) -> str:
    """Say in which keys two layouts differ; empty if in none."""
    reshaped = [f"{key} {found[key]} for {known[key]}" for key in known if key in found and found[key] != known[key]]
    parts = (
        ("missing", [key for key in known if key not in found]),
        ("unexpected", [key for key in found if key not in known]),
        ("of another shape", reshaped),
    )
    return "; ".join(f"{len(keys)} {what}: {_listed(sorted(keys))}" for what, keys in parts if keys)


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (" …" if len(keys) > _SHOWN else "")


def _fill_unsaved(model: nn.Module, build: Callable[[], nn.Module]) -> None:
    """Give position indices and the like the values that building the model in memory gives them."""
    saved = model.state_dict().keys()
    unsaved = [name for name, _ in model.named_buffers() if name not in saved]
    if not unsaved:
        return
    values = dict(build().named_buffers())
    for name in unsaved:
        owner, _, own_name = name.rpartition(".")
        model.get_submodule(owner).register_buffer(own_name, values[name], persistent=False)
