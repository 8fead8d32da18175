"""Stage `export`: the averaged weights as a diffusers folder in fp16."""

from pathlib import Path
from typing import Any

import diffusers
from transformers import CLIPTokenizer

from pasd_tiny.networks import build_networks, build_scheduler, build_vae
from pasd_tiny.training import averaged_weights, part
from sdconvert.io.files import atomic_folder, write_json_atomic
from sdconvert.models.pasd import save_pasd

_CLASSES = {
    "controlnet": ("diffusers", "ControlNetModel"),
    "scheduler": ("diffusers", "DDIMScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


def export(folder: Path, tokenizer: CLIPTokenizer) -> None:
    """Write the model of stage `diffusion`; the folder's tokenizer and README are kept."""
    networks, vae = build_networks(tokenizer), build_vae()
    weights = averaged_weights("diffusion")
    for name, network in (networks.named() | {"vae": vae}).items():
        network.load_state_dict(part(weights, name))
    save_pasd(networks.unet.half(), networks.controlnet.half(), folder)
    models: dict[str, Any] = {"text_encoder": networks.text_encoder, "vae": vae}
    for name, model in models.items():
        with atomic_folder(folder / name) as temporary:
            model.half().save_pretrained(temporary)
            for path in temporary.iterdir():
                path.chmod(0o644)  # safetensors writes for the owner alone
    with atomic_folder(folder / "scheduler") as temporary:
        build_scheduler().save_pretrained(temporary)
    index = {
        "_class_name": "StableDiffusionControlNetPipeline",
        "_diffusers_version": diffusers.__version__,
    }
    write_json_atomic(
        index | {name: list(origin) for name, origin in _CLASSES.items()},
        folder / "model_index.json",
    )
