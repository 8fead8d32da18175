"""One tiny model of every family and variant: the real config with small widths, and a call of it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from static_graphs import golden_case
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdconvert.adapters import GraphSize, ModelAdapter, adapter_for
from sdconvert.adapters.modeling_clip import CLIPTextModelAdapter
from sdconvert.models.autoencoder_kl import AutoencoderKLEncoder

# As in the config.json of Stable Diffusion 1.5, but for the widths (a 40th) and the sample (an eighth).
SD15_UNET: dict[str, Any] = {
    "block_out_channels": [8, 16, 32, 32],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "sample_size": 16,
}
SD21_UNET = SD15_UNET | {"attention_head_dim": [1, 2, 4, 4], "use_linear_projection": True, "upcast_attention": True}
SDXL_ADDED: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
    "transformer_layers_per_block": [1, 2, 3],
    "attention_head_dim": [1, 2, 4],
    "use_linear_projection": True,
}
SDXL_UNET = SD15_UNET | {
    "block_out_channels": [8, 16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    **SDXL_ADDED,
}
ONLY_UNET = ("up_block_types", "sample_size")
CONTROLNET = {key: value for key, value in SD15_UNET.items() if key not in ONLY_UNET}
SDXL_CONTROLNET = {key: value for key, value in SDXL_UNET.items() if key not in ONLY_UNET}
CONDITIONING = {"conditioning_embedding_out_channels": [4, 8, 12, 16]}
VAE: dict[str, Any] = {
    "block_out_channels": [8, 16, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "sample_size": 64,
}
CLIP: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 96,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "vocab_size": 1000,
    "projection_dim": 24,
    "bos_token_id": 998,
    "eos_token_id": 999,
    "pad_token_id": 1,
}
PIXART: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 6,
    "num_layers": 3,
    "cross_attention_dim": 24,
    "caption_channels": 20,
    "sample_size": 16,
}


@dataclass(frozen=True)
class Family:
    """A tiny model, a call of it by argument name, and the size of that call."""

    adapter: ModelAdapter
    call: dict[str, Any]
    size: GraphSize

    def adapter_of(self, model: nn.Module) -> ModelAdapter:
        """An adapter with this one's options for another model of the class."""
        adapter = copy.copy(self.adapter)
        adapter.model = model
        return adapter

    @torch.no_grad()
    def call_model(self) -> list[Tensor]:
        """The tensors that the model itself answers with, without what the graph leaves out."""
        model: Any = self.adapter.model
        if isinstance(model, AutoencoderKLEncoder):
            return [model.encode(self.call["sample"], return_dict=False)[0].parameters]
        if isinstance(model, AutoencoderKL):
            return list(model.decode(self.call["latent_sample"], return_dict=False))
        answer = model(**self.call, return_dict=False)
        if isinstance(model, ControlNetModel):
            *_, down, mid = answer
            return [*down, mid]
        if self.call.get("output_hidden_states"):
            # As diffusers' SDXL takes them; only the encoder with projection has the second.
            pooled = [answer[0]] if isinstance(model, CLIPTextModelWithProjection) else []
            return [model(**self.call).hidden_states[-2], *pooled]
        return [answer[0]]


def perturbed(model: nn.Module) -> nn.Module:
    """The model without layers that begin as zero or as one, which would hide what is behind them."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.ndim == 1 or not parameter.any():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def family(model: nn.Module, size: GraphSize, **call: Any) -> Family:
    return Family(adapter_for(perturbed(model)), call, size)


def build(cls: Callable[..., Any], config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return cls(**config)


def diffusion_call(width: int, height: int = 16, tokens: int = 7) -> dict[str, Any]:
    return {
        "sample": torch.randn(1, 4, height, 16),
        "timestep": torch.tensor(601),
        "encoder_hidden_states": torch.randn(1, tokens, width),
    }


def added_conditions() -> dict[str, Tensor]:
    return {"text_embeds": torch.randn(1, 20), "time_ids": torch.tensor([[1024.0, 1024, 0, 8, 1024, 768]])}


def unet(config: dict[str, Any]) -> Family:
    call = diffusion_call(24)
    return family(build(UNet2DConditionModel, config), GraphSize(tokens=7), **call)


def sdxl_unet() -> Family:
    model = build(UNet2DConditionModel, SDXL_UNET)
    return family(model, GraphSize(tokens=7), **diffusion_call(24), added_cond_kwargs=added_conditions())


def unet_behind_controlnet() -> Family:
    """On a sample whose height halves to odd numbers: 20, 10, 5, 3."""
    model, call = build(UNet2DConditionModel, SD15_UNET), diffusion_call(24, 20)
    size = GraphSize(height=20, tokens=7, controlnet=True)
    *down, mid = [spec for spec in adapter_for(model).io_spec(size).inputs if "residual" in spec.name]
    call["down_block_additional_residuals"] = [torch.randn(spec.shape) for spec in down]
    return family(model, size, **call, mid_block_additional_residual=torch.randn(mid.shape))


def pasd(part: str, variant: str = "pasd") -> Family:
    case = golden_case(part, variant)
    _, _, height, width = case.call["sample"].shape
    return Family(case.adapter, case.call, GraphSize(height, width, tokens=case.call["encoder_hidden_states"].shape[1]))


def controlnet(config: dict[str, Any], **extras: Any) -> Family:
    model = build(ControlNetModel, config | CONDITIONING)
    call = diffusion_call(24, 24) | {"controlnet_cond": torch.rand(1, 3, 192, 128)}
    return family(model, GraphSize(24, 16, tokens=7), **call, **extras)


def vae() -> Family:
    return family(build(AutoencoderKL, VAE), GraphSize(), latent_sample=torch.randn(1, 4, 8, 8))


def vae_encoder() -> Family:
    half = AutoencoderKLEncoder.of(perturbed(build(AutoencoderKL, VAE)))
    return Family(adapter_for(half), {"sample": torch.rand(1, 3, 64, 64) * 2 - 1}, GraphSize())


def clip(cls: type = CLIPTextModel, **config: Any) -> Family:
    model = build(lambda **options: cls(CLIPTextConfig(**options)), CLIP | config)
    ids = torch.randint(0, 900, (1, 77))
    ids[0, 0], ids[0, 9:] = 998, 999
    return family(model, GraphSize(), input_ids=ids)


def sdxl_clip(second: bool, **config: Any) -> Family:
    made = clip(CLIPTextModelWithProjection if second else CLIPTextModel, **config)
    adapter = made.adapter if second else CLIPTextModelAdapter(made.adapter.model, penultimate=True)
    return Family(adapter, made.call | {"output_hidden_states": True}, made.size)


def pixart(**config: Any) -> Family:
    model = build(PixArtTransformer2DModel, PIXART | config)
    call = diffusion_call(20, tokens=9)
    mask = torch.ones(1, 9, dtype=torch.int64)
    mask[:, 6:] = 0
    sizes = {"resolution": torch.tensor([[1024.0, 768.0]]), "aspect_ratio": torch.tensor([[0.75]])}
    return family(
        model,
        GraphSize(tokens=9),
        hidden_states=call["sample"],
        encoder_hidden_states=call["encoder_hidden_states"],
        timestep=call["timestep"].reshape(1),
        encoder_attention_mask=mask,
        added_cond_kwargs=sizes if model.use_additional_conditions else None,
    )


def samples(made: Family) -> list[dict[str, Tensor]]:
    """Graph inputs to take ranges from: of the family's call, and random ones under the same mask."""
    inputs = made.adapter.pack(made.call)
    mask = {name: tensor for name, tensor in inputs.items() if name == "encoder_attention_mask"}
    return [inputs, *(made.adapter.dummy_inputs(made.adapter.io_spec(made.size), seed) | mask for seed in (1, 2))]


@cache
def shared_family(name: str) -> Family:
    """One of each per process; whoever changes it makes another."""
    torch.manual_seed(1)
    return FAMILIES[name]()


FAMILIES: dict[str, Callable[[], Family]] = {
    "sd15_unet": lambda: unet(SD15_UNET),
    "sd15_unet_behind_controlnet": unet_behind_controlnet,
    "sd21_unet": lambda: unet(SD21_UNET),
    "sdxl_unet": sdxl_unet,
    "pasd_unet": lambda: pasd("unet"),
    "pasd_light_unet": lambda: pasd("unet", "pasd_light"),
    "pasd_controlnet": lambda: pasd("controlnet"),
    "controlnet": lambda: controlnet(CONTROLNET),
    "sdxl_controlnet": lambda: controlnet(SDXL_CONTROLNET, added_cond_kwargs=added_conditions()),
    "vae": vae,
    "vae_encoder": vae_encoder,
    "clip": clip,
    "clip_openai_activation": lambda: clip(hidden_act="gelu"),
    "sdxl_clip": lambda: sdxl_clip(second=False),
    "sdxl_clip_with_projection": lambda: sdxl_clip(second=True, hidden_act="gelu", projection_dim=20),
    "pixart": pixart,
    "pixart_with_sizes": lambda: pixart(use_additional_conditions=True),
}
