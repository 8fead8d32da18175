"""Models are read from any place on the disk that holds them whole; what is not whole or not known is named."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from sdconvert.errors import CheckpointError, MissingModelError, SdconvertError, UnsupportedModelError, UsageError
from sdconvert.io.tensors import load_tensors, save_tensors
from sdconvert.models.pasd import load_pasd
from sdconvert.pipelines.layouts import FAMILIES, build_on_meta, find_family, layout, recognized
from sdconvert.pipelines.model_config import ModelConfig
from sdconvert.pipelines.model_pool import ModelPool, pool_models
from sdconvert.pipelines.pasd import PASDPipeline
from sdconvert.pipelines.residency import ModelResidency
from sdconvert.pipelines.stable_diffusion import StableDiffusionPipeline

REQUEST: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 1}
PARTS = ("unet", "controlnet", "vae", "text_encoder", "tokenizer", "scheduler")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection is a failure."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"the network is touched: {args}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def sharded(pasd_folder: Path, tmp_path: Path) -> Path:
    """The VAE's folder in three shards."""
    AutoencoderKL.from_pretrained(pasd_folder / "vae").save_pretrained(tmp_path / "vae", max_shard_size="40KB")
    assert len(list((tmp_path / "vae").glob("*-of-*.safetensors"))) >= 3
    return tmp_path / "vae"


def assert_same(model: torch.nn.Module, file: Path) -> None:
    state = model.state_dict()
    expected = load_tensors(file)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_d11_a_diffusers_folder(pasd_folder: Path, image: Tensor, offline: None) -> None:
    """What the stock loaders and PASD's own read, bit for bit."""
    unet, controlnet = load_pasd(pasd_folder)
    stock = PASDPipeline(
        unet=unet,
        controlnet=controlnet,
        vae=AutoencoderKL.from_pretrained(pasd_folder / "vae", low_cpu_mem_usage=False),
        text_encoder=CLIPTextModel.from_pretrained(pasd_folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(pasd_folder / "tokenizer"),
        scheduler=DDIMScheduler.from_pretrained(pasd_folder / "scheduler"),
    )
    expected = stock(image, **REQUEST)
    assert torch.equal(PASDPipeline.from_pretrained(pasd_folder)(image, **REQUEST), expected)
    pipe = PASDPipeline.from_pretrained(model_configs=[ModelConfig(pasd_folder)])
    assert torch.equal(pipe(image, **REQUEST), expected)


def test_d11_component_folders(pasd_folder: Path, loaded: PASDPipeline, image: Tensor, offline: None) -> None:
    """The UNet from elsewhere, the others from a folder that lacks it."""
    pool = pool_models([ModelConfig(pasd_folder / part) for part in ("unet", "controlnet", "vae", "text_encoder")])
    for name in ("unet", "controlnet", "vae"):
        assert_same(pool.fetch_model(name), pasd_folder / name / WEIGHTS)
    assert_same(pool.fetch_model("text_encoder"), pasd_folder / "text_encoder" / "model.safetensors")
    models = {name: pool.fetch_model(name) for name in ("unet", "controlnet", "vae", "text_encoder")}
    pipe = PASDPipeline(**models, tokenizer=loaded.tokenizer, scheduler=loaded.scheduler)
    assert torch.equal(pipe(image, **REQUEST), loaded(image, **REQUEST))


def test_d11_a_single_file_with_its_config_beside_it(pasd_folder: Path, offline: None) -> None:
    pool = pool_models([ModelConfig(pasd_folder / "vae" / WEIGHTS)])
    assert_same(pool.fetch_model("vae"), pasd_folder / "vae" / WEIGHTS)


def test_d11_shards_by_folder_and_by_index(pasd_folder: Path, sharded: Path, offline: None) -> None:
    for path in (sharded, next(sharded.glob("*.index.json"))):
        assert_same(pool_models([ModelConfig(path)]).fetch_model("vae"), pasd_folder / "vae" / WEIGHTS)


def test_d11_half_precision_is_read_as_asked(pasd_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pasd_folder / "vae", tmp_path / "vae")
    AutoencoderKL.from_pretrained(folder).half().save_pretrained(folder)
    assert pool_models([ModelConfig(folder)]).fetch_model("vae").dtype == torch.float32
    assert pool_models([ModelConfig(folder)], torch.float16).fetch_model("vae").dtype == torch.float16


def test_d11_names_of_older_files_are_understood(pasd_folder: Path, tmp_path: Path) -> None:
    vae, text = (shutil.copytree(pasd_folder / part, tmp_path / part) for part in ("vae", "text_encoder"))
    tensors = load_tensors(vae / WEIGHTS)
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        tensors = {key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): one for key, one in tensors.items()}
    assert "decoder.mid_block.attentions.0.query.weight" in tensors
    save_tensors(tensors, vae / WEIGHTS)
    encoder = {f"text_model.{key}": one for key, one in load_tensors(text / "model.safetensors").items()}
    save_tensors({**encoder, "text_model.embeddings.position_ids": torch.arange(16)[None]}, text / "model.safetensors")
    pool = pool_models([ModelConfig(vae), ModelConfig(text)])
    assert_same(pool.fetch_model("vae"), pasd_folder / "vae" / WEIGHTS)
    assert_same(pool.fetch_model("text_encoder"), pasd_folder / "text_encoder" / "model.safetensors")


def test_d11_missing_shards_are_named_before_the_type_is_asked(sharded: Path) -> None:
    shards = sorted(sharded.glob("*-of-*.safetensors"))
    for shard in shards[1:]:
        shard.unlink()
    (sharded / "config.json").write_text('{"_class_name": "NoSuchModel"}')
    with pytest.raises(CheckpointError, match=f"lacks {len(shards) - 1} of {len(shards)} files.*: {shards[1].name}"):
        pool_models([ModelConfig(sharded)])


def test_d11_one_shard_alone_is_refused(sharded: Path, tmp_path: Path) -> None:
    shard = sorted(sharded.glob("*-of-*.safetensors"))[0]
    with pytest.raises(CheckpointError, match="is one of . parts") as error:
        pool_models([ModelConfig(shard)])
    assert "index.json" in error.value.hint
    alone = shutil.copy(shard, tmp_path / shard.name)
    with pytest.raises(CheckpointError, match=r"index\.json` is not beside it"):
        pool_models([ModelConfig(alone)])


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: _truncate(folder / WEIGHTS), "cannot be read as .safetensors"),
        (lambda folder: (folder / WEIGHTS).unlink(), "holds neither"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json` cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds a list, not an object"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_d11_a_damaged_folder_is_refused(
    pasd_folder: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    folder = shutil.copytree(pasd_folder / "vae", tmp_path / "vae")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        pool_models([ModelConfig(folder)])


def test_d11_weights_and_config_of_different_models_are_told_apart_by_key(pasd_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pasd_folder / "vae", tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "latent_channels": 8}))
    with pytest.raises(CheckpointError, match=r"of another shape: .*decoder.conv_in.weight \(16, 4, 3, 3\) for"):
        pool_models([ModelConfig(folder)])


def test_d11_an_unknown_layout_gets_the_nearest_known_one_and_the_differing_keys() -> None:
    """An inpainting UNet, that is Stable Diffusion 1.5 but for nine input channels."""
    config = {**FAMILIES["UNet2DConditionModel"].known["Stable Diffusion 1.5"], "in_channels": 9}
    shapes = layout(build_on_meta("UNet2DConditionModel", config))
    with pytest.raises(
        UnsupportedModelError, match="nearest is Stable Diffusion 1.5, from which 1 keys differ"
    ) as error:
        recognized("UNet2DConditionModel", shapes)
    assert "conv_in.weight (320, 9, 3, 3) for (320, 4, 3, 3)" in str(error.value)
    assert "config.json" in error.value.hint


def test_d11_a_file_without_config_that_is_no_known_model_says_so(pasd_folder: Path, tmp_path: Path) -> None:
    shutil.copy(pasd_folder / "vae" / WEIGHTS, tmp_path / "mine.safetensors")
    with pytest.raises(UnsupportedModelError, match="no known AutoencoderKL; nearest is Stable Diffusion, from which"):
        pool_models([ModelConfig(tmp_path / "mine.safetensors")])


@pytest.mark.parametrize("family", FAMILIES)
def test_d11_released_layouts_are_recognized_without_reading_weights(family: str) -> None:
    for name, config in FAMILIES[family].known.items():
        shapes = layout(build_on_meta(family, config))
        assert find_family(shapes, {}) == family
        assert recognized(family, shapes) is config, name


def test_d11_the_known_layouts_are_those_of_released_files() -> None:
    """Key counts and parameters as the model cards and PASD's own code have them."""
    unet = build_on_meta("UNet2DConditionModel", FAMILIES["UNet2DConditionModel"].known["Stable Diffusion 1.5"])
    assert sum(one.numel() for one in unet.parameters()) == 859_520_964
    assert layout(unet) == layout_of(UNet2DConditionModel, cross_attention_dim=768)
    golden = json.loads((Path(__file__).parents[1] / "golden/pasd_keys/pasd_full_unet_keys.json").read_text())
    pasd = layout(build_on_meta("PASD UNet", FAMILIES["PASD UNet"].known["PASD"]))
    assert pasd == {key: tuple(shape) for key, shape in golden["state_dict"].items()}


def layout_of(cls: Any, **config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return layout(cls(**config))


def test_weights_of_no_family_are_refused(tmp_path: Path) -> None:
    save_tensors({"layer.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"keys such as layer\.weight; known families: PASD UNet") as error:
        pool_models([ModelConfig(tmp_path / "x.safetensors")])
    save_tensors({"model.diffusion_model.out.weight": torch.zeros(2)}, tmp_path / "ldm.safetensors")
    with pytest.raises(UnsupportedModelError, match="original layout") as error:
        pool_models([ModelConfig(tmp_path / "ldm.safetensors")])
    assert "from_single_file" in error.value.hint


def test_models_of_one_name_are_told_apart_by_index(pasd_folder: Path) -> None:
    pool = ModelPool()
    for _ in range(2):
        assert pool.auto_load_model(ModelConfig(pasd_folder / "vae")) == ("vae",)
    assert pool.fetch_model("vae", index=0) is not pool.fetch_model("vae", index=1)
    with pytest.raises(MissingModelError, match="2 models are called 'vae'"):
        pool.fetch_model("vae")
    with pytest.raises(MissingModelError, match="there is no number 2"):
        pool.fetch_model("vae", index=2)
    with pytest.raises(MissingModelError, match="no model is called 'vea'; loaded: vae") as error:
        pool.fetch_model("vea")
    assert "vae" in error.value.hint


@pytest.mark.parametrize(
    ("configs", "error", "message"),
    [
        (lambda folder: [ModelConfig(folder / "vae")], MissingModelError, "needs unet, controlnet, text_encoder, tok"),
        (lambda folder: [], MissingModelError, "loaded: nothing"),
        (lambda folder: [ModelConfig(folder), ModelConfig(folder / "vae", name="vea")], UsageError, "no use for 'vea'"),
        (lambda folder: [ModelConfig(folder, name="unet")], UsageError, "cannot all be called 'unet'"),
        (lambda folder: [ModelConfig(folder), ModelConfig(folder / "vae")], MissingModelError, "2 models are called"),
        (lambda folder: [ModelConfig("runwayml/stable-diffusion-v1-5")], CheckpointError, "does not exist"),
    ],
)
def test_a_request_that_makes_no_pipeline_is_refused(
    pasd_folder: Path, offline: None, configs: Any, error: type[SdconvertError], message: str
) -> None:
    with pytest.raises(error, match=message):
        PASDPipeline.from_pretrained(model_configs=configs(pasd_folder))


def test_a_pipeline_takes_what_it_has_a_use_for(pasd_folder: Path, offline: None) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(pasd_folder)
    assert pipe.controlnet is None or pipe.controlnet.config.conditioning_embedding_out_channels


def test_d7_with_residency_weights_stay_on_the_disk_until_called(
    pasd_folder: Path, loaded: PASDPipeline, image: Tensor, tmp_path: Path
) -> None:
    residency = ModelResidency(folder=tmp_path / "offload")
    pipe = PASDPipeline.from_pretrained(pasd_folder, residency=residency)
    assert set(residency.states.values()) == {"offload"}
    assert residency.memory_bytes == 0
    assert torch.equal(pipe(image, **REQUEST), loaded(image, **REQUEST))
    assert not (tmp_path / "offload").exists(), "the model's own files are read, and nothing is written"


def test_d7_what_is_no_single_file_is_written_as_one_before_the_next_model_comes_in(
    pasd_folder: Path, sharded: Path, tmp_path: Path
) -> None:
    residency = ModelResidency(folder=tmp_path / "offload")
    pool = pool_models([ModelConfig(sharded), ModelConfig(pasd_folder / "unet")], residency=residency)
    assert residency.states == {"vae": "offload", "unet": "offload"}
    assert residency.memory_bytes == 0
    assert [file.name for file in (tmp_path / "offload").iterdir()] == ["vae.safetensors"]
    residency.load(["vae"])
    assert_same(pool.fetch_model("vae"), pasd_folder / "vae" / WEIGHTS)
