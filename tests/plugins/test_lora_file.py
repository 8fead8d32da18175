"""LoRA files of every style change the weights exactly as diffusers and peft do, or are refused whole."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdconvert.errors import CheckpointError, PluginError
from sdconvert.io.tensors import load_tensors, save_tensors
from sdconvert.plugins.lora_attach import attach_lora, fuse_lora

GOLDEN = Path(__file__).parents[1] / "golden" / "lora"
SMALL: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TO_OUT = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(1)
    return UNet2DConditionModel(**SMALL, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).eval()


def clone(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("style", "reference"), [("diffusers", "diffusers"), ("kohya", "diffusers"), ("diffusers_old", "diffusers_old")]
)
def test_fused_weights_equal_those_of_diffusers_and_peft(unet: Any, style: str, reference: str) -> None:
    stock, delta = clone(unet), load_tensors(GOLDEN / f"{reference}.delta.safetensors")
    changed = fuse_lora(unet, GOLDEN / f"{style}.safetensors", scale=0.7)
    assert {f"{path}.weight" for path in changed["unet"]} == set(delta)
    assert len(delta) == 46
    for name, tensor in unet.state_dict().items():
        if name in delta:
            assert torch.allclose(tensor - stock[name], delta[name], atol=2e-6)
            assert delta[name].abs().max() > 1e-2
        else:
            assert torch.equal(tensor, stock[name])


def test_an_attached_file_computes_what_the_fused_one_does(unet: Any, structure: Any) -> None:
    before, stock = structure(unet), clone(unet)
    inputs = (torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 12))
    with torch.no_grad():
        plain = unet(*inputs).sample
        groups = attach_lora(unet, GOLDEN / "kohya.safetensors", 0.2)
        live = unet(*inputs).sample
        groups["unet"].remove()
        assert structure(unet) == before
        assert torch.equal(unet(*inputs).sample, plain)
        fuse_lora(unet, GOLDEN / "kohya.safetensors", 0.2)
        fused = unet(*inputs).sample
    assert (live - plain).abs().max() > 0.1 * plain.abs().max()
    assert (fused - live).abs().max() <= 1e-4 * live.abs().max()
    assert structure(unet) == before
    fuse_lora(unet, GOLDEN / "kohya.safetensors", -0.2)
    assert all(torch.allclose(tensor, stock[name], atol=1e-6) for name, tensor in unet.state_dict().items())


def factors(out: int, inside: int, rank: int = 2, kernel: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    ones = (1,) * len(kernel)
    return torch.randn(rank, inside, *kernel), torch.randn(out, rank, *ones)


STYLES: dict[str, Callable[[str, Tensor, Tensor], dict[str, Tensor]]] = {
    "peft": lambda path, down, up: {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up},
    "peft with prefix": lambda path, down, up: {
        f"base_model.model.unet.{path}.lora_A.weight": down,
        f"base_model.model.unet.{path}.lora_B.weight": up,
    },
    "linear layer": lambda path, down, up: {
        f"unet.{path}.lora_linear_layer.down.weight": down,
        f"unet.{path}.lora_linear_layer.up.weight": up,
    },
    "processor": lambda path, down, up: {
        f"{path[: path.index('.to_')]}.processor{path[path.index('.to_') :].removesuffix('.0')}_lora.{side}.weight": t
        for side, t in (("down", down), ("up", up))
    },
    "kohya": lambda path, down, up: {
        f"lora_unet_{path.replace('.', '_')}.lora_{side}.weight": t for side, t in (("down", down), ("up", up))
    },
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("path", [TO_Q, TO_OUT])
@settings(deadline=None, max_examples=5)
@given(scale=st.floats(-2, 2).filter(lambda s: abs(s) > 1e-3), rank=st.integers(1, 5), square=st.booleans())
def test_every_style_adds_the_formula(style: str, path: str, scale: float, rank: int, square: bool) -> None:
    layer_host = UNet2DConditionModel(**SMALL, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    before = clone(layer_host)
    down, up = factors(16, 16, rank, (1, 1) if square else ())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        save_tensors(STYLES[style](path, down, up), file)
        assert fuse_lora(layer_host, file, scale) == {"unet": [path]}
    expected = before[f"{path}.weight"] + scale * up.flatten(1) @ down.flatten(1)
    assert torch.allclose(layer_host.state_dict()[f"{path}.weight"], expected, atol=1e-5)


def test_one_by_one_convolutions_and_linear_layers_are_one_thing(unet: Any, tmp_path: Path) -> None:
    path = "mid_block.attentions.0.proj_in"
    down, up = factors(16, 16)
    before = unet.get_submodule(path).weight.clone()
    assert before.shape == (16, 16, 1, 1)
    save_tensors(STYLES["peft"](path, down, up), tmp_path / "lora.safetensors")
    fuse_lora(unet, tmp_path / "lora.safetensors")
    assert torch.allclose(unet.get_submodule(path).weight, before + (up @ down)[..., None, None], atol=1e-6)


@pytest.mark.parametrize("prefix", ["lora_te_text_model_", "lora_te1_", "text_encoder.text_model.", "text_encoder."])
def test_all_models_of_a_pipeline_are_reached(unet: Any, prefix: str, tmp_path: Path) -> None:
    text_config = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    models: dict[str, Any] = {
        "unet": unet,
        "controlnet": ControlNetModel(**SMALL, conditioning_embedding_out_channels=(4, 4)),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text_config, vocab_size=20, max_position_embeddings=5)),
    }
    q_proj, underscored = "encoder.layers.0.self_attn.q_proj", prefix.endswith("_")
    text_layer = prefix + (q_proj.replace(".", "_") if underscored else q_proj)
    down_key, up_key = ("lora_down", "lora_up") if underscored else ("lora_A", "lora_B")
    down, up = factors(8, 8)
    controlnet_down, controlnet_up = factors(8, 4, kernel=(3, 3))
    tensors = STYLES["kohya"](TO_Q, *factors(16, 16))
    tensors |= {f"{text_layer}.{down_key}.weight": down, f"{text_layer}.{up_key}.weight": up}
    tensors |= {
        "lora_controlnet_conv_in.lora_down.weight": controlnet_down,
        "lora_controlnet_conv_in.lora_up.weight": controlnet_up,
        "lora_controlnet_conv_in.alpha": torch.tensor([4.0]),
    }
    save_tensors(tensors, tmp_path / "lora.safetensors")
    before = {name: clone(model) for name, model in models.items()}
    changed = fuse_lora(models, tmp_path / "lora.safetensors", 0.5)
    assert {k: v for k, v in changed.items() if k != "text_encoder"} == {"unet": [TO_Q], "controlnet": ["conv_in"]}
    (text_path,) = changed["text_encoder"]
    assert text_path.endswith(q_proj)
    weight = models["text_encoder"].get_submodule(text_path).weight
    assert torch.allclose(weight, before["text_encoder"][f"{text_path}.weight"] + 0.5 * up @ down, atol=1e-6)
    product = (controlnet_up.flatten(1) @ controlnet_down.flatten(1)).view(8, 4, 3, 3)
    expected = before["controlnet"]["conv_in.weight"] + 0.5 * 4.0 / 2 * product
    assert torch.allclose(models["controlnet"].conv_in.weight, expected, atol=1e-6)


def good() -> dict[str, Tensor]:
    return STYLES["kohya"](TO_Q, *factors(16, 16))


def _without(part: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in good().items() if part not in key}


REFUSED: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "nothing": (dict, "holds no tensors"),
    "a model": (lambda: {"conv_in.weight": torch.zeros(8, 4, 3, 3)}, "1 keys that are no LoRA: conv_in.weight"),
    "half a pair": (lambda: _without("lora_up"), "no LoRA: lora_unet_mid_block.*lora_down.weight"),
    "an alpha alone": (lambda: good() | {"lora_unet_conv_in.alpha": torch.tensor(1.0)}, "lora_unet_conv_in.alpha"),
    "LoHa": (lambda: good() | {"lora_unet_conv_in.hada_w1_a": torch.zeros(8, 2)}, "lora_unet_conv_in.hada_w1_a"),
    "Tucker": (lambda: good() | {"lora_unet_conv_in.lora_mid.weight": torch.zeros(2, 2, 3, 3)}, "lora_mid.weight"),
    "DoRA": (lambda: good() | {"lora_unet_conv_in.dora_scale": torch.zeros(8)}, "dora_scale"),
    "no such layer": (
        lambda: good() | STYLES["kohya"]("down_blocks.7.attn1.to_q", *factors(16, 16)),
        "2 for no layer of unet: lora_unet_down_blocks_7_attn1_to_q.lora_down.weight",
    ),
    "a layer that is no matrix": (
        lambda: good() | STYLES["peft"]("conv_norm_out", *factors(8, 8)),
        "2 for no layer of unet: conv_norm_out",
    ),
    "no such model": (
        lambda: (
            good() | {"lora_te2_a.lora_down.weight": torch.zeros(2, 8), "lora_te2_a.lora_up.weight": torch.zeros(8, 2)}
        ),
        r"2 for a model that is not loaded \(text_encoder_2\): lora_te2_a",
    ),
    "another width": (
        lambda: STYLES["kohya"](TO_Q, *factors(24, 16)),
        r"1 of another shape: .*\(24, 2\) @ \(2, 16\), not \(16, 16\)",
    ),
    "another kernel": (
        lambda: STYLES["peft"]("conv_in", *factors(8, 4, kernel=(1, 1))),
        "1 of another shape: conv_in",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_lands_nowhere_is_listed_and_nothing_is_changed(
    unet: Any, fault: str, tmp_path: Path, structure: Any
) -> None:
    make, message = REFUSED[fault]
    save_tensors(make(), tmp_path / "lora.safetensors")
    before, stock = structure(unet), clone(unet)
    with pytest.raises(CheckpointError, match=message):
        fuse_lora(unet, tmp_path / "lora.safetensors")
    assert structure(unet) == before
    assert all(torch.equal(tensor, stock[name]) for name, tensor in unet.state_dict().items())


def test_metadata_that_changes_the_meaning_is_obeyed_or_refused(unet: Any, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    down, up = factors(16, 16, rank=4)
    weight = unet.get_submodule(TO_Q).weight
    for text, gain in (
        ('{"unet.lora_alpha": 8}', 2.0),
        ('{"unet.lora_alpha": 8, "unet.use_rslora": true}', 4.0),
        ("{}", 1.0),
    ):
        save_tensors(
            STYLES["peft with prefix"](TO_Q, down, up), file, metadata={"lora_adapter_metadata": text, "format": "pt"}
        )
        before = weight.detach().clone()
        fuse_lora(unet, file)
        assert torch.allclose(weight, before + gain * up @ down, atol=1e-4)
    for text, message in (('{"unet.use_dora": true}', "is a DoRA"), ("{", "is no JSON")):
        save_tensors(STYLES["peft"](TO_Q, down, up), file, metadata={"lora_adapter_metadata": text})
        with pytest.raises(CheckpointError, match=message):
            fuse_lora(unet, file)


def test_a_scale_of_zero_and_a_missing_file_are_refused(unet: Any, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="a scale of 0"):
        fuse_lora(unet, GOLDEN / "kohya.safetensors", 0.0)
    with pytest.raises(CheckpointError, match="does not exist"):
        fuse_lora(unet, tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        fuse_lora(unet, tmp_path / "bad.safetensors")
