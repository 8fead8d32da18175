"""Stock pipelines of diffusers with random weights: the real architectures of each family with small widths."""

from functools import cache
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny_parts import text_config, vae, without_zeros
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from sdconvert.assets import asset_path

BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BLOCKS: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
}
CLIP_TOKENS = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
UP: dict[str, Any] = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
# As stabilityai/stable-diffusion-xl-base-1.0 has them: no attention in the first block, several transformer layers.
SDXL: dict[str, Any] = BLOCKS | {
    "cross_attention_dim": 32,
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 4 * 6 + 12,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 2),
}


@cache
def sd15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5: eight heads everywhere (here two), 1x1 convolutions around attention, epsilon, PNDM."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**BLOCKS, **UP, cross_attention_dim=16, attention_head_dim=2)
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    return _stable_diffusion(unet, "quick_gelu", scheduler)


@cache
def sd21() -> StableDiffusionPipeline:
    """Stable Diffusion 2.1: heads of one size, linear projections, a text encoder with GELU, v-prediction."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        **BLOCKS, **UP, cross_attention_dim=16, attention_head_dim=(1, 2), use_linear_projection=True
    )
    scheduler = DDIMScheduler(
        **BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    return _stable_diffusion(unet, "gelu", scheduler)


@cache
def controlnet() -> StableDiffusionControlNetPipeline:
    """The SD 1.5 fixture under a ControlNet whose zero convolutions are not zero."""
    torch.manual_seed(2)
    model = ControlNetModel(
        **{key: value for key, value in BLOCKS.items() if key != "sample_size"},
        cross_attention_dim=16,
        attention_head_dim=2,
        conditioning_embedding_out_channels=(8, 16),
    )
    parts = {name: part for name, part in sd15().components.items() if name != "image_encoder"}
    return StableDiffusionControlNetPipeline(
        **parts, controlnet=without_zeros(model).eval(), requires_safety_checker=False
    )


@cache
def sdxl() -> StableDiffusionXLPipeline:
    """SDXL: two text encoders, sizes as conditions, Euler."""
    torch.manual_seed(3)
    unet = UNet2DConditionModel(**SDXL, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    encoders = [
        cls(text_config(16, layers=3, hidden_act=hidden_act, projection_dim=12, **CLIP_TOKENS)).eval()
        for cls, hidden_act in ((CLIPTextModel, "quick_gelu"), (CLIPTextModelWithProjection, "gelu"))
    ]
    pipe = StableDiffusionXLPipeline(
        vae=vae(8, 8),
        unet=unet.eval(),
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )
    return _silent(pipe)


@cache
def pixart(sample_size: int = 8) -> PixArtAlphaPipeline:
    """PixArt-alpha: a transformer that learned the variance; with 128 latents a side, size conditions too."""
    torch.manual_seed(4)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        out_channels=8,
        num_layers=2,
        norm_num_groups=4,
        cross_attention_dim=24,
        sample_size=sample_size,
        caption_channels=24,
    )
    config = T5Config(
        vocab_size=64, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    pipe = PixArtAlphaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=T5EncoderModel(config).eval(),
        vae=vae(8, 8),
        transformer=transformer.eval(),
        # Starting from the last timestep, where 1/sqrt(alphas_cumprod) is 157, an untrained model's latents explode.
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, timestep_spacing="leading"),
    )
    return _silent(pipe)


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's own."""
    return CLIPTokenizer.from_pretrained(asset_path("pasd_tiny") / "tokenizer")


def t5_tokenizer() -> T5Tokenizer:
    """T5's algorithm (a unigram model) over single letters."""
    letters = [("▁", -1.0), *((chr(97 + index), -2.0 - index) for index in range(26))]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)


def _stable_diffusion(unet: UNet2DConditionModel, hidden_act: str, scheduler: Any) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=vae(8, 8),
        text_encoder=CLIPTextModel(
            text_config(16, layers=3, hidden_act=hidden_act, projection_dim=16, **CLIP_TOKENS)
        ).eval(),
        tokenizer=clip_tokenizer(),
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _silent(pipe)


def _silent(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
