"""Head counts from configs, as the models themselves have them, and from a file, in which nothing may be in vain."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from static_graphs import SMALL_UNET, golden_case, small_case, vae_case
from torch import nn

from sdconvert.errors import CheckpointError, UsageError
from sdconvert.mha2sha.head_counts import heads_from_config, read_heads_file
from sdconvert.mha2sha.heads import attention_paths, head_splits

CROSS_AND_SIMPLE: dict[str, Any] = SMALL_UNET | {
    "down_block_types": ["CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"],
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "attention_head_dim": [4, 8],
    "block_out_channels": [8, 16],
}
UNCONDITIONAL: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
}
MODELS: dict[str, Callable[[], Any]] = {
    "pasd": lambda: golden_case("unet", "pasd").adapter.model,
    "pasd_light": lambda: golden_case("unet", "pasd_light").adapter.model,
    "pasd controlnet": lambda: golden_case("controlnet", "pasd").adapter.model,
    "rrdb controlnet": lambda: golden_case("controlnet", "pasd_rrdb").adapter.model,
    "rising": lambda: small_case(SMALL_UNET | {"attention_head_dim": [2, 4]}).adapter.model,
    "falling": lambda: small_case(SMALL_UNET | {"attention_head_dim": [4, 2]}).adapter.model,
    "one": lambda: small_case(SMALL_UNET | {"attention_head_dim": 1}).adapter.model,
    "vae": lambda: vae_case().adapter.model,
    "vq": lambda: VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=2, sample_size=8),
    "pixart": lambda: PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=4, num_layers=2, cross_attention_dim=12, sample_size=8
    ),
    "blocks of both kinds": lambda: UNet2DConditionModel(**CROSS_AND_SIMPLE),
    "unconditional": lambda: UNet2DModel(**UNCONDITIONAL, attention_head_dim=4),
    "unconditional with one head": lambda: UNet2DModel(**UNCONDITIONAL, attention_head_dim=None),
}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_config_and_model_agree_on_the_heads(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    expected = {path: module.heads for path, module in model.named_modules() if isinstance(module, Attention)}
    shapes = shapes_of(model)
    config = json.loads(model.to_json_string())
    found = heads_from_config(config, attention_paths(shapes), shapes)
    assert found == expected != {}
    head_splits(shapes, found)


def config(**changes: Any) -> dict[str, Any]:
    return {"_class_name": "X", "down_block_types": ["A", "B", "C"], "attention_head_dim": [1, 2, 3], **changes}


@pytest.mark.parametrize(
    ("layer", "heads"),
    [("down_blocks.0.a", 1), ("down_blocks.2.a", 3), ("up_blocks.0.a", 3), ("up_blocks.2.a", 1), ("mid_block.a", 3)],
)
def test_up_blocks_take_the_list_backwards_and_the_mid_block_its_last(layer: str, heads: int) -> None:
    assert heads_from_config(config(), [layer]) == {layer: heads}
    assert heads_from_config(config(num_attention_heads=5), [layer]) == {layer: 5}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"attention_head_dim": None}, UsageError, "config.json of a X names no heads per block"),
        ({"down_block_types": []}, UsageError, "names no heads per block"),
        ({"attention_head_dim": [1, 2]}, CheckpointError, r"heads of 2 blocks, \[1, 2\], but 3 blocks"),
        ({"attention_head_dim": "8"}, CheckpointError, "names '8' heads"),
        ({"attention_head_dim": [1, 0, 2]}, CheckpointError, "names 0 heads"),
        ({"attention_head_dim": True}, CheckpointError, "names True heads"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, CheckpointError, "heads of 3 channels, .* has no rows"),
    ],
)
def test_a_config_that_does_not_say_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        heads_from_config(config(**changes), ["mid_block.a"])


@pytest.mark.parametrize("layer", ["down_blocks.3.a", "encoder.a", "down_blocks.x.a", "a"])
def test_a_layer_in_no_block_is_refused(layer: str) -> None:
    with pytest.raises(CheckpointError, match=f"attention layer `{layer}` is in no block"):
        heads_from_config(config(), [layer])


LAYERS = ["down_blocks.0.attn1", "down_blocks.0.attn2", "mid_block.attn1"]


def heads_file(folder: Path, content: Any) -> Path:
    path = folder / "heads.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("content", "heads"),
    [
        ({LAYERS[0]: 1, LAYERS[1]: 2, LAYERS[2]: 3}, [1, 2, 3]),
        ({"*": 4}, [4, 4, 4]),
        ({"down_blocks.*": 2, "mid_block.attn?": 8}, [2, 2, 8]),
        ({"*": 2, LAYERS[1]: 5}, [2, 5, 2]),
        ({"*": 2, "*.attn1": 2}, [2, 2, 2]),
    ],
)
def test_a_file_names_layers_and_patterns(content: Any, heads: list[int], tmp_path: Path) -> None:
    assert read_heads_file(heads_file(tmp_path, content), LAYERS) == dict(zip(LAYERS, heads, strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"*": 2, "mid_block.attn9": 3}, "layers that the weights do not have: `mid_block.attn9`"),
        ({"*": 2, "up_blocks.*": 3}, r"do not have: `up_blocks\.\*`"),
        ({"down_blocks.*": 2}, "gives 1 of 3 attention layers no head count: `mid_block.attn1`"),
        ({"*": 2, "*.attn1": 4}, r"several head counts: 2 by `\*`, 4 by `\*\.attn1`"),
        ({"*": 0}, r"gives `\*` 0 heads"),
        ({"*": True}, r"gives `\*` True heads"),
        ({"*": 2.0}, r"gives `\*` 2.0 heads"),
        ({"*": "2"}, r"gives `\*` '2' heads"),
        ([2], "holds no object"),
        ({}, "holds no object"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"*": 2, "*": 3}', r"names `\*` more than once"),
    ],
)
def test_a_file_with_anything_in_vain_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        read_heads_file(heads_file(tmp_path, content), LAYERS)


def test_a_file_that_is_not_there_or_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_heads_file(tmp_path / "none.json", LAYERS)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        read_heads_file(tmp_path / "bytes.json", LAYERS)


def test_an_unknown_layer_gets_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        read_heads_file(heads_file(tmp_path, {"mid_block.attn9": 3}), LAYERS)
    assert error.value.hint == "nearest layer: `mid_block.attn1`"
