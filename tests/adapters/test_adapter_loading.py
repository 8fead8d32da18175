"""One model folder is read strictly, by the class that its config names."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from model_families import CLIP, SD15_UNET, build
from static_graphs import GOLDEN
from transformers import CLIPTextConfig, CLIPTextModel

from sdconvert.adapters.loading import load_model
from sdconvert.errors import CheckpointError, UnsupportedModelError
from sdconvert.io.tensors import save_tensors
from sdconvert.models.pasd import load_pasd

SMALL = SD15_UNET | {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build(UNet2DConditionModel, SMALL).half().save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_diffusers_model_is_read_in_float32(folder: Path) -> None:
    expected, model = build(UNet2DConditionModel, SMALL).half().float(), load_model(folder)
    assert type(model) is UNet2DConditionModel
    assert not model.training
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))


def test_a_transformers_model_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    written = CLIPTextModel(CLIPTextConfig(**CLIP))
    written.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert type(model) is CLIPTextModel
    assert list(model.state_dict()) == list(written.state_dict())
    assert all(map(torch.equal, model.state_dict().values(), written.state_dict().values()))


def test_a_text_encoder_of_before_transformers_5_is_read(tmp_path: Path) -> None:
    written = CLIPTextModel(CLIPTextConfig(**CLIP))
    written.save_pretrained(tmp_path)
    old = {f"text_model.{name}": tensor for name, tensor in written.state_dict().items()}
    old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_tensors(old, tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    assert all(map(torch.equal, model.state_dict().values(), written.state_dict().values()))


@pytest.mark.parametrize("variant", ["pasd", "pasd_light"])
def test_pasd_is_told_from_the_stock_models_by_its_weights_and_config(variant: str) -> None:
    for part, expected in zip(("unet", "controlnet"), load_pasd(GOLDEN / variant), strict=True):
        state = load_model(GOLDEN / variant / part).state_dict()
        assert state.keys() == expected.state_dict().keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.state_dict().items())


def test_a_class_without_a_family_gets_the_known_ones_and_the_line(folder: Path) -> None:
    edit(folder, _class_name="FluxTransformer2DModel")
    with pytest.raises(UnsupportedModelError, match="holds a FluxTransformer2DModel; known: AutoencoderKL") as error:
        load_model(folder)
    assert "@AdapterRegistry.register(FluxTransformer2DModel)" in error.value.hint


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    edit(folder, layers_per_block=2)
    with pytest.raises(CheckpointError, match=r"does not fit a UNet2DConditionModel: \d+ tensors .*down_blocks"):
        load_model(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), "holds neither"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"no weights"), "cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json` cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds a list"),
        (lambda folder: edit(folder, down_block_types=["NoSuchBlock"]), "makes no UNet2DConditionModel"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(folder: Path, damage: object, message: str) -> None:
    assert callable(damage)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)
