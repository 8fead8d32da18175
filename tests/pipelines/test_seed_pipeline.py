"""The guide's three units and its `__call__`, as they stand there; only the imports are ours (D1).

Where the guide writes `# Do something` there is something, its placeholders `XXX_Model`, `YYY_Model`, `ZZZ_Model` and
its scheduler are small real ones, and one more unit turns the noise into latents.
"""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
from PIL import Image
from tiny_diffusers import clip_tokenizer, pixart, sd15
from torch import Tensor
from transformers import CLIPTextModel

from sdconvert.pipelines.base import BasePipeline
from sdconvert.pipelines.graph import PipelineUnitGraph
from sdconvert.pipelines.unit import PipelineUnit

QwenImagePipeline = Any  # the guide's units name it in their signatures


class FlowMatchScheduler(FlowMatchEulerDiscreteScheduler):
    """Flow matching that begins part of the way when told to, and whose step gives the latents themselves."""

    def set_timesteps(self, num_inference_steps: int, denoising_strength: float = 1.0) -> None:
        super().set_timesteps(sigmas=torch.linspace(denoising_strength, 1 / num_inference_steps, num_inference_steps))

    def step(self, noise_pred: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        moved: Tensor = super().step(noise_pred, timestep, latents, return_dict=False)[0]
        return moved


class YYY_Model(PixArtTransformer2DModel):  # noqa: N801
    def forward(self, latents: Tensor, prompt_emb: Tensor, timestep: Tensor) -> Tensor:
        conditions = {"resolution": None, "aspect_ratio": None}
        out = super().forward(latents, prompt_emb, timestep, conditions, return_dict=False)[0]
        return out.chunk(2, dim=1)[0]


class ZZZ_Model(AutoencoderKL):  # noqa: N801
    def decode(self, latents: Tensor, device: torch.device) -> Tensor:
        return super().decode(latents.to(device), return_dict=False)[0]


# --- from here on as in the guide ------------------------------------------------------------------------------------


class QwenImageUnit_NoiseInitializer(PipelineUnit):  # noqa: N801
    def __init__(self):
        super().__init__(
            input_params=("height", "width", "seed", "rand_device"),
            output_params=("noise",),
        )

    def process(self, pipe: QwenImagePipeline, height, width, seed, rand_device):
        noise = pipe.generate_noise(
            (1, 16, height // 8, width // 8), seed=seed, rand_device=rand_device, rand_torch_dtype=pipe.torch_dtype
        )
        return {"noise": noise}


class QwenImageUnit_PromptEmbedder(PipelineUnit):  # noqa: N801
    def __init__(self):
        super().__init__(
            seperate_cfg=True,
            input_params_posi={"prompt": "prompt"},
            input_params_nega={"prompt": "negative_prompt"},
            input_params=("edit_image",),
            output_params=("prompt_emb", "prompt_emb_mask"),
            onload_model_names=("text_encoder",),
        )

    def process(self, pipe: QwenImagePipeline, prompt, edit_image=None) -> dict:
        pipe.load_models_to_device(self.onload_model_names)
        # Do something
        tokens = pipe.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt")
        prompt_embeds = pipe.text_encoder(tokens.input_ids)[0]
        encoder_attention_mask = tokens.attention_mask
        return {"prompt_emb": prompt_embeds, "prompt_emb_mask": encoder_attention_mask}


class QwenImageUnit_EntityControl(PipelineUnit):  # noqa: N801
    def __init__(self):
        super().__init__(
            take_over=True,
            input_params=("eligen_entity_prompts", "width", "height", "eligen_enable_on_negative", "cfg_scale"),
            output_params=("entity_prompt_emb", "entity_masks", "entity_prompt_emb_mask"),
            onload_model_names=("text_encoder",),
        )

    def process(self, pipe: QwenImagePipeline, inputs_shared, inputs_posi, inputs_nega):
        # Do something
        if inputs_shared.get("eligen_entity_prompts"):
            pipe.load_models_to_device(self.onload_model_names)
            tokens = pipe.tokenizer(inputs_shared["eligen_entity_prompts"], return_tensors="pt", padding=True)
            inputs_posi["entity_prompt_emb"] = pipe.text_encoder(tokens.input_ids)[0]
        return inputs_shared, inputs_posi, inputs_nega


class NewDiffSynthPipelineUnit_Latents(PipelineUnit):  # noqa: N801
    def __init__(self):
        super().__init__(input_params=("noise", "input_image"), output_params=("latents",))

    def process(self, pipe, noise, input_image=None):
        return {"latents": noise[:, :4]}  # the guide's noise has sixteen channels


class NewDiffSynthPipeline(BasePipeline):
    def __init__(self, device="cuda", torch_dtype=torch.bfloat16):
        super().__init__(device=device, torch_dtype=torch_dtype)
        self.scheduler = FlowMatchScheduler()
        self.text_encoder: CLIPTextModel = None
        self.dit: YYY_Model = None
        self.vae: ZZZ_Model = None
        self.in_iteration_models = ("dit",)
        self.units = [
            QwenImageUnit_NoiseInitializer(),
            QwenImageUnit_PromptEmbedder(),
            QwenImageUnit_EntityControl(),
            NewDiffSynthPipelineUnit_Latents(),
        ]
        self.model_fn = model_fn_new

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        negative_prompt: str = "",
        cfg_scale: float = 4.0,
        input_image: Image.Image = None,
        denoising_strength: float = 1.0,
        height: int = 1328,
        width: int = 1328,
        seed: int = None,  # noqa: RUF013
        rand_device: str = "cpu",
        num_inference_steps: int = 30,
        progress_bar_cmd=list,
    ):
        # Scheduler
        self.scheduler.set_timesteps(num_inference_steps, denoising_strength=denoising_strength)

        # Parameters
        inputs_posi = {
            "prompt": prompt,
        }
        inputs_nega = {
            "negative_prompt": negative_prompt,
        }
        inputs_shared = {
            "cfg_scale": cfg_scale,
            "input_image": input_image,
            "denoising_strength": denoising_strength,
            "height": height,
            "width": width,
            "seed": seed,
            "rand_device": rand_device,
            "num_inference_steps": num_inference_steps,
        }
        for unit in self.units:
            inputs_shared, inputs_posi, inputs_nega = self.unit_runner(
                unit, self, inputs_shared, inputs_posi, inputs_nega
            )

        # Denoise
        self.load_models_to_device(self.in_iteration_models)
        models = {name: getattr(self, name) for name in self.in_iteration_models}
        for progress_id, timestep in enumerate(progress_bar_cmd(self.scheduler.timesteps)):
            timestep = timestep.unsqueeze(0).to(dtype=self.torch_dtype, device=self.device)  # noqa: PLW2901

            # Inference
            noise_pred_posi = self.model_fn(
                **models, **inputs_shared, **inputs_posi, timestep=timestep, progress_id=progress_id
            )
            if cfg_scale != 1.0:
                noise_pred_nega = self.model_fn(
                    **models, **inputs_shared, **inputs_nega, timestep=timestep, progress_id=progress_id
                )
                noise_pred = noise_pred_nega + cfg_scale * (noise_pred_posi - noise_pred_nega)
            else:
                noise_pred = noise_pred_posi

            # Scheduler
            inputs_shared["latents"] = self.step(
                self.scheduler, progress_id=progress_id, noise_pred=noise_pred, **inputs_shared
            )

        # Decode
        self.load_models_to_device(["vae"])
        image = self.vae.decode(inputs_shared["latents"], device=self.device)
        image = self.vae_output_to_image(image)
        self.load_models_to_device([])

        return image


def model_fn_new(dit=None, latents=None, timestep=None, prompt_emb=None, **kwargs):
    return dit(latents, prompt_emb, timestep)


# --- the guide ends here ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guide() -> NewDiffSynthPipeline:
    pipe = NewDiffSynthPipeline(device="cpu", torch_dtype=torch.float32)
    pipe.tokenizer, pipe.text_encoder = clip_tokenizer(), sd15().text_encoder
    torch.manual_seed(0)
    pipe.dit = YYY_Model(**{**pixart().transformer.config, "caption_channels": 16}).eval()
    pipe.vae = ZZZ_Model(**sd15().vae.config).eval()
    return pipe


SIZE = {"height": 64, "width": 96, "num_inference_steps": 2}


def test_d1_the_call_of_the_guide_makes_a_picture(guide: NewDiffSynthPipeline) -> None:
    image = guide("a cat", negative_prompt="dots", seed=3, **SIZE)
    assert isinstance(image, Image.Image)
    assert image.size == (96 // 8 * 2, 64 // 8 * 2)  # the guide counts eight pixels per latent, this VAE has two
    assert image.tobytes() == guide("a cat", negative_prompt="dots", seed=3, **SIZE).tobytes()
    for other in ({"prompt": "a dog"}, {"negative_prompt": ""}, {"seed": 4}, {"cfg_scale": 1.0}):
        assert (
            image.tobytes()
            != guide(**{"prompt": "a cat", "negative_prompt": "dots", "seed": 3, **SIZE, **other}).tobytes()
        )


def test_d1_the_guides_units_run_in_all_three_modes(guide: NewDiffSynthPipeline) -> None:
    noise, prompt, entities, _ = guide.units
    assert (noise.mode, prompt.mode, entities.mode) == ("direct", "separate CFG", "take-over")
    shared = {"height": 64, "width": 64, "seed": 0, "rand_device": "cpu", "cfg_scale": 2.0}
    asked = {**shared, "eligen_entity_prompts": ["a hat", "a tail"], "eligen_enable_on_negative": False}
    with torch.no_grad():
        after, posi, nega = guide.run_units(guide.units, asked, {"prompt": "a cat"}, {"negative_prompt": ""})
    assert after["noise"].shape == (1, 16, 8, 8)
    assert posi["prompt_emb"].shape == nega["prompt_emb"].shape == (1, 77, 16)
    assert not torch.equal(posi["prompt_emb"], nega["prompt_emb"])
    assert posi["entity_prompt_emb"].shape[0] == 2
    assert "entity_prompt_emb" not in nega


def test_d1_the_guides_pipeline_can_be_split_and_drawn(guide: NewDiffSynthPipeline) -> None:
    graph = PipelineUnitGraph(guide.all_units)
    assert graph.model_names == ("text_encoder", "dit")
    ahead, later = graph.split_pipeline_units(["text_encoder"])
    assert [unit.name.rpartition("_")[2] for unit in ahead] == ["NoiseInitializer", "Latents"]
    assert [unit.name.rpartition("_")[2] for unit in later] == ["PromptEmbedder", "EntityControl", "DenoisingLoop"]
