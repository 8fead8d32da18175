"""Write this folder's files with diffusers and peft; see README.md. python tests/golden/lora/make.py FOLDER"""

import re
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

SCALE = 0.7
ALPHA, ALPHA_PATTERN = 6, {"conv1": 3, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 1}
TARGETS = ["to_q", "to_v", "to_out.0", "conv1", "conv_shortcut", "proj_in", "ff.net.2", "linear_1"]


def build() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def train(out: Path) -> dict[str, Tensor]:
    """Save random factors as diffusers does; return them by peft's keys."""
    unet: Any = build()
    unet.add_adapter(LoraConfig(r=2, lora_alpha=ALPHA, target_modules=TARGETS, alpha_pattern=ALPHA_PATTERN))
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    state: dict[str, Tensor] = get_peft_model_state_dict(unet)
    metadata = unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(
        out, state, weight_name="diffusers.safetensors", unet_lora_adapter_metadata=metadata
    )
    return state


def alpha_of(layer: str) -> Tensor:
    matching = (value for pattern, value in ALPHA_PATTERN.items() if re.match(rf"(.*\.)?({pattern})$", layer))
    return torch.tensor(float(next(matching, ALPHA)))


def save_other_styles(state: dict[str, Tensor], out: Path) -> None:
    """The same factors as kohya's trainer writes them, and as diffusers did without alphas."""
    kohya, old = {}, {}
    for key, tensor in state.items():
        layer, part = key.rsplit(".lora_", 1)
        name, side = "lora_unet_" + layer.replace(".", "_"), {"A.weight": "down", "B.weight": "up"}[part]
        kohya |= {f"{name}.lora_{side}.weight": tensor, f"{name}.alpha": alpha_of(layer)}
        old[f"unet.{layer}.lora.{side}.weight"] = tensor
    save_file(kohya, out / "kohya.safetensors")
    save_file(old, out / "diffusers_old.safetensors")


def delta(out: Path, file: str) -> dict[str, Tensor]:
    """What diffusers' own load_lora_weights and fuse_lora add to the weights."""
    unet, stock = build(), build().state_dict()
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = StableDiffusionPipeline(unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts)
    pipe.load_lora_weights(out, weight_name=file)
    pipe.fuse_lora(components=["unet"], lora_scale=SCALE)
    pipe.unload_lora_weights()
    fused = unet.state_dict()
    return {key: fused[key] - stock[key] for key in stock if not torch.equal(fused[key], stock[key])}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    save_other_styles(train(folder), folder)
    for style in ("diffusers", "diffusers_old"):
        save_file(delta(folder, f"{style}.safetensors"), folder / f"{style}.delta.safetensors")
