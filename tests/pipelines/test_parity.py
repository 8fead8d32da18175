"""Our pipelines against diffusers' own: the same weights, prompts and seeds give the same latents and pictures."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, UniPCMultistepScheduler
from tiny_diffusers import controlnet, pixart, sd15, sd21, sdxl
from torch import Tensor

from sdconvert.errors import CheckpointError, MissingModelError, UnitError, UsageError
from sdconvert.pipelines.base import BasePipeline
from sdconvert.pipelines.controlnet import StableDiffusionControlNetPipeline
from sdconvert.pipelines.pixart_alpha import PixArtAlphaPipeline
from sdconvert.pipelines.registry import PipelineRegistry
from sdconvert.pipelines.stable_diffusion import StableDiffusionPipeline
from sdconvert.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline

PROMPT = {"prompt": "a photo of a cat", "num_inference_steps": 3}
GUIDED = PROMPT | {"guidance_scale": 4.0, "negative_prompt": "dots"}


def ours(original: Any, pipeline_class: Any) -> Any:
    """Our pipeline on the models of one of diffusers'."""
    ignored = ("safety_checker", "feature_extractor", "image_encoder")
    return pipeline_class(**{name: part for name, part in original.components.items() if name not in ignored})


def run(pipe: BasePipeline, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The final latents, and the picture as a batch of one."""
    steps: list[Tensor] = []
    picture = pipe(**arguments, callback=lambda index, timestep, latents: steps.append(latents))
    return steps[-1], picture[None]


def theirs(original: Any, seed: int = 5, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The same of diffusers."""
    latents, picture = (
        original(**arguments, generator=torch.Generator().manual_seed(seed), output_type=kind, return_dict=False)[0]
        for kind in ("latent", "pt")
    )
    return latents, picture


def assert_equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for tensor, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, reference, atol=1e-4, rtol=0)
        assert float(reference.std()) > 1e-3


@pytest.mark.parametrize(
    ("original", "pipeline_class"),
    [
        (sd15, StableDiffusionPipeline),
        (sd21, StableDiffusionPipeline),
        (controlnet, StableDiffusionControlNetPipeline),
        (sdxl, StableDiffusionXLPipeline),
        (pixart, PixArtAlphaPipeline),
    ],
)
def test_the_registry_knows_ours_by_diffusers_class(original: Any, pipeline_class: Any) -> None:
    assert PipelineRegistry.lookup(type(original())) is pipeline_class


@pytest.mark.parametrize("arguments", [PROMPT | {"guidance_scale": 1.0}, GUIDED, PROMPT])
@pytest.mark.parametrize("original", [sd15, sd21], ids=["sd15", "sd21"])
def test_stable_diffusion_is_diffusers(original: Any, arguments: dict[str, Any]) -> None:
    found = run(ours(original(), StableDiffusionPipeline), **arguments, seed=5)
    assert_equal(found, theirs(original(), **arguments))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, UniPCMultistepScheduler, EulerAncestralDiscreteScheduler])
def test_every_kind_of_sampler_is_driven_as_diffusers_drives_it(scheduler: Any) -> None:
    original = sd15()
    kept, original.scheduler = original.scheduler, scheduler.from_config(original.scheduler.config)
    try:
        assert_equal(run(ours(original, StableDiffusionPipeline), **GUIDED, seed=5), theirs(original, **GUIDED))
    finally:
        original.scheduler = kept


def test_the_prediction_type_is_heeded() -> None:
    original = sd21()
    kept = original.scheduler
    original.scheduler = DDIMScheduler.from_config(kept.config, prediction_type="epsilon")
    try:
        latents, _ = run(ours(original, StableDiffusionPipeline), **GUIDED, seed=5)
    finally:
        original.scheduler = kept
    assert not torch.allclose(latents, theirs(original, **GUIDED)[0], atol=1e-2)


@pytest.mark.parametrize("scale", [None, 0.6])
@pytest.mark.parametrize("pipeline_class", [StableDiffusionControlNetPipeline, StableDiffusionPipeline])
def test_controlnet_is_diffusers(pipeline_class: Any, scale: float | None) -> None:
    image = torch.rand(3, 20, 12, generator=torch.Generator().manual_seed(0))
    asked = {} if scale is None else {"controlnet_conditioning_scale": scale}
    expected = theirs(controlnet(), **GUIDED, **asked, image=image[None], height=20, width=12)
    pipe = ours(controlnet(), pipeline_class)
    assert_equal(run(pipe, **GUIDED, seed=5, control_image=image, conditioning_scale=scale), expected)
    weaker, _ = run(pipe, **GUIDED, seed=5, control_image=image, conditioning_scale=0.1)
    assert not torch.allclose(weaker, expected[0], atol=1e-3)


@pytest.mark.parametrize(
    "arguments",
    [
        PROMPT | {"guidance_scale": 1.0},
        PROMPT,  # no negative prompt: zeros for embeddings
        PROMPT | {"negative_prompt": ""},
        GUIDED | {"prompt_2": "a dog", "negative_prompt_2": "lines"},
    ],
)
def test_stable_diffusion_xl_is_diffusers(arguments: dict[str, Any]) -> None:
    found = run(ours(sdxl(), StableDiffusionXLPipeline), **arguments, height=16, width=24, seed=5)
    assert_equal(found, theirs(sdxl(), **arguments, height=16, width=24))


def test_sizes_as_conditions_are_diffusers_and_have_an_effect() -> None:
    sizes = {"original_size": (64, 48), "crops_coords_top_left": (3, 5), "target_size": (16, 24)}
    negative = {"original_size": (8, 8), "crops_coords_top_left": (0, 0), "target_size": (9, 9)}
    given = GUIDED | {"height": 16, "width": 24}
    expected = theirs(sdxl(), **given, **sizes, **{f"negative_{key}": value for key, value in negative.items()})
    pipe = ours(sdxl(), StableDiffusionXLPipeline)
    assert_equal(run(pipe, **given, seed=5, sizes=sizes, negative_sizes=negative), expected)
    assert not torch.equal(run(pipe, **given, seed=5, sizes=sizes)[0], expected[0])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("sample_size", [8, 128])
def test_pixart_alpha_is_diffusers(sample_size: int, steps: int) -> None:
    original = pixart(sample_size)
    kept = original.scheduler
    if steps == 1:  # only some samplers tell the clean latents
        original.scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False)
    given = GUIDED | {"height": 16, "width": 24, "num_inference_steps": steps}
    try:
        expected = theirs(original, **given, use_resolution_binning=False, clean_caption=False)
        assert_equal(run(ours(original, PixArtAlphaPipeline), **given, seed=5), expected)
    finally:
        original.scheduler = kept


CASES: list[tuple[Any, Any]] = [
    (sd15, StableDiffusionPipeline),
    (sdxl, StableDiffusionXLPipeline),
    (pixart, PixArtAlphaPipeline),
]


@pytest.mark.parametrize(("original", "pipeline_class"), CASES)
def test_embeddings_in_place_of_prompts_need_no_text_encoder(original: Any, pipeline_class: Any) -> None:
    pipe = ours(original(), pipeline_class)
    steps = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 8, "width": 8}
    expected = pipe("a cat", **steps, negative_prompt="dots")
    shared, posi, nega = pipe.inputs("a cat", **steps, negative_prompt="dots")
    with torch.no_grad():
        _, posi, nega = pipe.run_units(pipe.units[:2], shared, posi, nega)
    keys = pipe.units[1].output_params
    embeds, negative = ({key: side[key] for key in keys} for side in (posi, nega))
    if keys == ("prompt_embeds",):
        given = {"prompt_embeds": embeds["prompt_embeds"], "negative_prompt_embeds": negative["prompt_embeds"]}
    else:
        given = {"embeds": embeds, "negative_embeds": negative}
    pipe.text_encoder = pipe.text_encoder_2 = None
    assert torch.equal(pipe(**steps, **given), expected)
    with pytest.raises(UsageError, match="prompt has no effect beside"):
        pipe("a cat", **steps, **given)
    with pytest.raises(MissingModelError, match="'text_encoder', which is not loaded for the given prompt"):
        pipe("a cat", **steps)


@pytest.mark.parametrize(("original", "pipeline_class"), CASES)
def test_first_latents_may_be_given(original: Any, pipeline_class: Any) -> None:
    pipe = ours(original(), pipeline_class)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    small = GUIDED | {"height": 16, "width": 16}
    assert torch.equal(pipe(**small, latents=latents), pipe(**small, seed=9))
    with pytest.raises(UsageError, match=r"latents have shape \(1, 4, 4, 4\), not \(1, 4, 8, 8\)"):
        pipe(**small, latents=latents[..., :4, :4])


@pytest.mark.parametrize(("original", "pipeline_class"), CASES)
def test_d12_a_size_between_latents_is_rounded_up_and_the_picture_cut_back(original: Any, pipeline_class: Any) -> None:
    pipe = ours(original(), pipeline_class)
    assert pipe(**PROMPT, height=15, width=9).shape == (3, 15, 9)
    steps: list[Tensor] = []
    pipe(**PROMPT, height=15, width=9, callback=lambda index, timestep, latents: steps.append(latents))
    assert steps[-1].shape == (1, 4, 8, 6 if original is pixart else 5)  # pixart reads patches of two latents


@pytest.mark.parametrize(("original", "pipeline_class"), CASES)
def test_tiles_have_one_static_size(original: Any, pipeline_class: Any) -> None:
    pipe = ours(original(), pipeline_class)
    name = pipe.in_iteration_models[0]
    model, shapes = getattr(pipe, name), []

    def watched(sample: Tensor, *args: Any, **keywords: Any) -> Any:
        shapes.append(tuple(sample.shape))
        return model(sample, *args, **keywords)

    setattr(pipe, name, watched)
    picture = pipe(**PROMPT, height=16, width=24, latent_tile=8, latent_overlap=4)
    assert picture.shape == (3, 16, 24)
    assert set(shapes) == {(1, 4, 8, 8)}
    assert len(shapes) == 3 * 2 * 2 + (2 * 2 if original is sd15 else 0)  # PNDM asks once more in its second step


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "no prompt is given"),
        ({"guidance_scale": 0.5}, "below 1"),
        ({"num_inference_steps": 0}, "samples nothing"),
        ({"guidance_scale": 1.0, "negative_prompt": "dots"}, "negative_prompt has no effect without guidance"),
        ({"height": 0}, "0x16 pixels are no picture"),
        ({"conditioning_scale": 0.5}, "no effect without a control image"),
        ({"control_image": torch.zeros(3, 16, 16), "height": 8}, r"16x16 pixels \(height x width\), the picture 8x16"),
        ({"control_image": torch.full((3, 16, 16), 2.0)}, "control image's values lie in"),
        ({"latent_overlap": 2}, "no effect without tiles"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ours(controlnet(), StableDiffusionPipeline)(**PROMPT | arguments)


@pytest.mark.parametrize(("original", "pipeline_class"), CASES)
def test_an_unknown_argument_is_refused_by_name(original: Any, pipeline_class: Any) -> None:
    with pytest.raises(TypeError, match="latent_tiles"):
        ours(original(), pipeline_class)(**PROMPT, latent_tiles=8)
    with pytest.raises(TypeError, match="tokeniser"):
        ours(SimpleNamespace(components=original().components | {"tokeniser": None}), pipeline_class)


def test_sdxl_refuses_what_it_would_not_heed() -> None:
    pipe = ours(sdxl(), StableDiffusionXLPipeline)
    with pytest.raises(UsageError, match="negative_sizes has no effect"):
        pipe(**PROMPT, guidance_scale=1.0, negative_sizes={"target_size": (8, 8)})
    with pytest.raises(UsageError, match="unknown sizes: size"):
        pipe(**PROMPT, sizes={"size": (8, 8)})
    with pytest.raises(UsageError, match="prompt_embeds comes without text_embeds"):
        pipe(embeds={"prompt_embeds": torch.zeros(1, 77, 32)})
    with pytest.raises(CheckpointError, match="addition_embed_type is None"):
        StableDiffusionXLPipeline(
            **{name: getattr(pipe, name) for name in ("vae", "text_encoder", "text_encoder_2", "tokenizer")},
            tokenizer_2=pipe.tokenizer_2,
            scheduler=pipe.scheduler,
            unet=sd15().unet,
        )


def test_d5_a_control_image_without_a_controlnet_is_an_error_before_anything_is_computed() -> None:
    pipe = ours(sd15(), StableDiffusionPipeline)
    called: list[str] = []
    encoder = pipe.text_encoder
    pipe.text_encoder = lambda *args, **keywords: called.append("text_encoder") or encoder(*args, **keywords)
    with pytest.raises(MissingModelError, match="'controlnet', which is not loaded for the given control_image"):
        pipe(**PROMPT, control_image=torch.zeros(3, 16, 16))
    assert called == []


def test_d5_a_loaded_controlnet_without_a_control_image_is_skipped_without_being_brought_in() -> None:
    class Untouchable:
        """A ControlNet that nothing may ask for anything."""

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"the ControlNet was asked for {name}")

    pipe = ours(sd15(), StableDiffusionPipeline)
    expected = pipe(**GUIDED)
    pipe.controlnet = Untouchable()
    loaded: list[str] = []
    original = pipe.load_models_to_device
    pipe.load_models_to_device = lambda names: loaded.extend(names) or original(names)
    assert torch.equal(pipe(**GUIDED), expected)
    assert loaded == ["text_encoder", "text_encoder", "unet", "vae_decoder"]


def test_d5_a_pipeline_that_lives_of_its_control_image_requires_it() -> None:
    with pytest.raises(UsageError, match="the control image is missing"):
        ours(controlnet(), StableDiffusionControlNetPipeline)(**PROMPT)


def test_a_tile_is_made_of_whole_patches() -> None:
    with pytest.raises(UsageError, match="latent_tile=7 is no multiple of the model's patch of 2"):
        ours(pixart(), PixArtAlphaPipeline)(**PROMPT, latent_tile=7)


def test_a_model_function_that_asks_for_what_nobody_gives_is_refused() -> None:
    pipe = ours(sd15(), StableDiffusionPipeline)
    pipe.model_fn = lambda unet, latents, colour: latents
    with pytest.raises(UnitError, match="needs colour"):
        pipe(**PROMPT)
