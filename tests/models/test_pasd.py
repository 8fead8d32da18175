"""PASD equals the original code on its recorded runs, loads strictly, and refuses what is no PASD."""

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sdconvert.errors import CheckpointError, PluginError, UnsupportedModelError
from sdconvert.io.tensors import load_tensors, save_tensors
from sdconvert.models.attention import ExplicitAttnProcessor
from sdconvert.models.pasd import build_pasd, load_pasd, save_pasd
from sdconvert.models.pixel_attention import PixelAttentionPlugin

GOLDEN = Path(__file__).parents[1] / "golden"
KEYS = GOLDEN / "pasd_keys"
LIMIT = 1e-5
VARIANTS = ["pasd", "pasd_light", "pasd_rrdb"]
CASES = [("pasd", "io"), ("pasd", "io_extra"), ("pasd_light", "io"), ("pasd_light", "io_extra"), ("pasd_rrdb", "io")]
SD15 = {"attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768}
WEIGHTS = "diffusion_pytorch_model.safetensors"

Golden = Callable[..., Any]
Error = Callable[[Tensor, Tensor], float]


def configs(variant: str = "pasd") -> tuple[dict[str, Any], dict[str, Any]]:
    unet, controlnet = (
        json.loads((GOLDEN / variant / part / "config.json").read_text()) for part in ("unet", "controlnet")
    )
    return unet, controlnet


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the full variant's checkpoint that a test may damage."""
    return Path(shutil.copytree(GOLDEN / "pasd", tmp_path / "pasd"))


@pytest.mark.parametrize(("variant", "case"), CASES)
def test_h16_every_output_equals_the_original(variant: str, case: str, golden: Golden, relative_error: Error) -> None:
    reference = golden(variant, case)
    unet, controlnet = load_pasd(GOLDEN / variant)
    outputs = reference.run_controlnet(controlnet, return_dict=False)
    outputs["unet_out"] = reference.run_unet(unet, outputs)
    assert len(outputs) == 13
    for name, output in outputs.items():
        assert relative_error(output, reference.tensors[name]) <= LIMIT, name


@pytest.mark.parametrize(("variant", "case"), CASES)
def test_h16_unet_alone_equals_the_original(variant: str, case: str, golden: Golden, relative_error: Error) -> None:
    reference = golden(variant, case)
    unet, _ = load_pasd(GOLDEN / variant)
    assert relative_error(reference.run_unet(unet), reference.tensors["unet_out"]) <= LIMIT


@pytest.mark.parametrize(
    ("variant", "rrdb", "unet_file", "controlnet_file"),
    [
        ("full", False, "pasd_full_unet_keys", "pasd_full_controlnet_keys"),
        ("light", True, "pasd_light_full_unet_keys", "pasd_full_controlnet_rrdb_keys"),
    ],
)
def test_h16_full_size_key_sets(variant: Any, rrdb: bool, unet_file: str, controlnet_file: str) -> None:
    with torch.device("meta"):
        unet, controlnet = build_pasd(SD15, {**SD15, "use_rrdb": rrdb}, variant)
    for model, file in ((unet, unet_file), (controlnet, controlnet_file)):
        listed = json.loads((KEYS / f"{file}.json").read_text())
        assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == listed["state_dict"]
        assert sum(parameter.numel() for parameter in model.parameters()) == listed["total_parameters"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_h10_copies_and_pickles_compute_the_same(variant: str, golden: Golden) -> None:
    reference = golden(variant)
    unet, controlnet = load_pasd(GOLDEN / variant)
    expected = reference.run_controlnet(controlnet)
    for clone in (copy.deepcopy(controlnet), pickle.loads(pickle.dumps(controlnet))):
        outputs = reference.run_controlnet(clone)
        assert all(torch.equal(outputs[name], expected[name]) for name in expected)
    for clone in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert torch.equal(reference.run_unet(clone), reference.run_unet(unet))


class _UNetGraph(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, down: list[Tensor], mid: Tensor) -> Any:
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return self.unet(sample, timestep, text, **residuals, return_dict=False)[0]


class _ControlNetGraph(nn.Module):
    def __init__(self, controlnet: nn.Module) -> None:
        super().__init__()
        self.controlnet = controlnet

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, image: Tensor) -> Any:
        return self.controlnet(sample, timestep, text, image, return_rgbs=False)[1:]


@pytest.mark.parametrize("variant", ["pasd", pytest.param("pasd_light", marks=pytest.mark.slow)])
def test_h19_unet_exports_with_its_multi_plugin(variant: str, golden: Golden, relative_error: Error) -> None:
    reference = golden(variant)
    unet, _ = load_pasd(GOLDEN / variant)
    unet.set_attn_processor(ExplicitAttnProcessor())
    inputs = (*_inputs(reference), reference.down, reference.tensors["controlnet_mid"])
    program = torch.export.export(_UNetGraph(unet), inputs, strict=False)
    assert relative_error(program.module()(*inputs), reference.tensors["unet_out"]) <= LIMIT


def test_controlnet_exports_without_the_rgb_heads(golden: Golden, relative_error: Error) -> None:
    reference = golden("pasd_rrdb")
    _, controlnet = load_pasd(GOLDEN / "pasd_rrdb")
    inputs = (*_inputs(reference), reference.tensors["controlnet_cond"])
    program = torch.export.export(_ControlNetGraph(controlnet), inputs, strict=False)
    assert not [node for node in program.graph.nodes if "to_rgbs" in str(node.meta.get("nn_module_stack"))]
    assert not [node for node in program.graph.nodes if "to_rgbs" in node.name and node.users]
    scale = reference.tensors["conditioning_scale"]
    _, mid = program.module()(*inputs)
    assert relative_error(mid * scale, reference.tensors["controlnet_mid"]) <= LIMIT


def _inputs(reference: Any) -> tuple[Tensor, ...]:
    return tuple(reference.tensors[name] for name in ("sample", "timestep", "encoder_hidden_states"))


@pytest.mark.parametrize("variant", ["full", "light"])
def test_h5_removed_plugins_leave_stock_models(variant: Any) -> None:
    unet_config, controlnet_config = configs()
    models = build_pasd(unet_config, controlnet_config, variant)
    for model, cls in zip(models, (UNet2DConditionModel, ControlNetModel), strict=True):
        model.pasd.remove()
        stock = cls.from_config(dict(model.config))
        assert list(model.state_dict()) == list(stock.state_dict())
        assert [name for name, _ in model.named_modules()] == [name for name, _ in stock.named_modules()]
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_save_and_load_round_trip(variant: str, suffix: str, tmp_path: Path) -> None:
    models = load_pasd(GOLDEN / variant)
    save_pasd(*models, tmp_path)
    if suffix == ".bin":
        for part in ("unet", "controlnet"):
            save_tensors(load_tensors(tmp_path / part / WEIGHTS), tmp_path / part / "diffusion_pytorch_model.bin")
            (tmp_path / part / WEIGHTS).unlink()
    for model, loaded in zip(models, load_pasd(tmp_path), strict=True):
        original, again = model.state_dict(), loaded.state_dict()
        assert list(original) == list(again)
        assert all(torch.equal(original[name], again[name]) for name in original)
        assert dict(loaded.config).items() >= {k: v for k, v in model.config.items() if k[0] != "_"}.items()
        assert not loaded.training


def test_half_precision_weights_load_as_float32(checkpoint: Path) -> None:
    path = checkpoint / "unet" / WEIGHTS
    save_tensors({name: tensor.half() for name, tensor in load_tensors(path).items()}, path)
    unet, _ = load_pasd(checkpoint)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}


def test_unet_refuses_to_run_without_its_controlnet(golden: Golden) -> None:
    reference = golden("pasd")
    unet, _ = load_pasd(GOLDEN / "pasd")
    with pytest.raises(PluginError, match="residuals of its ControlNet"):
        unet(*_inputs(reference))
    with pytest.raises(PluginError, match="residuals of its ControlNet"):
        unet(*_inputs(reference), down_block_additional_residuals=reference.down)
    mid = reference.tensors["controlnet_mid"]
    with pytest.raises(PluginError, match="8 skip connections but got 7"):
        unet(*_inputs(reference), down_block_additional_residuals=reference.down[1:], mid_block_additional_residual=mid)


def test_residuals_may_be_positional_and_leave_no_trace(golden: Golden) -> None:
    reference = golden("pasd")
    unet, _ = load_pasd(GOLDEN / "pasd")
    with torch.no_grad():
        positional = unet(
            *_inputs(reference), None, None, None, None, None, reference.down, reference.tensors["controlnet_mid"]
        )
    assert torch.equal(positional.sample, reference.run_unet(unet))
    assert unet.pasd.residuals == ()


def test_controlnet_return_value(golden: Golden) -> None:
    reference = golden("pasd")
    _, controlnet = load_pasd(GOLDEN / "pasd")
    expected = reference.run_controlnet(controlnet)
    without = reference.run_controlnet(controlnet, return_rgbs=False)
    assert without.keys() == {name for name in expected if "rgb" not in name}
    assert all(torch.equal(without[name], expected[name]) for name in without)
    with pytest.raises(PluginError, match="returns a tuple"):
        reference.run_controlnet(controlnet, return_dict=True)
    controlnet.pasd.return_rgbs = False
    assert reference.run_controlnet(controlnet).keys() == without.keys()


def test_controlnet_without_rgb_heads(golden: Golden) -> None:
    unet_config, controlnet_config = configs()
    _, controlnet = build_pasd(unet_config, {**controlnet_config, "return_rgbs": False})
    assert not [name for name in controlnet.state_dict() if "to_rgbs" in name]
    reference = golden("pasd")
    assert "controlnet_rgb_0" not in reference.run_controlnet(controlnet)
    with pytest.raises(PluginError, match="without to_rgbs"):
        reference.run_controlnet(controlnet, return_rgbs=True)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from([4, 8, 12]), min_size=2, max_size=5), st.booleans())
def test_embedding_of_any_length(widths: list[int], rrdb: bool) -> None:
    unet_config, controlnet_config = configs()
    extras = {"conditioning_embedding_out_channels": widths, "use_rrdb": rrdb}
    _, controlnet = build_pasd(unet_config, {**controlnet_config, **extras})
    side = 8 * 2 ** (len(widths) - 1)
    with torch.no_grad():
        image = torch.rand(1, 3, side, side)
        rgbs, down, _ = controlnet(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 3, 32), image)
    assert [tuple(rgb.shape[1:]) for rgb in rgbs] == [(3, side >> i, side >> i) for i in range(1, len(widths))]
    assert down[0].shape[2:] == (8, 8)


@pytest.mark.parametrize("variant", ["full", "light"])
def test_several_transformer_layers_and_linear_projections(variant: Any) -> None:
    unet_config, controlnet_config = configs()
    changes = {"transformer_layers_per_block": [1, 1, 2, 1], "use_linear_projection": True}
    unet, controlnet = build_pasd({**unet_config, **changes}, {**controlnet_config, **changes}, variant)
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 3, 32)
    with torch.no_grad():
        _, down, mid = controlnet(sample, 5, text, torch.rand(2, 3, 128, 128))
        down = [torch.randn_like(residual) for residual in down]
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        with unet.pasd.disabled():
            stock = unet(sample, 5, text, **residuals).sample
        assert not torch.allclose(unet(sample, 5, text, **residuals).sample, stock)
    layers = {
        name.split("transformer_blocks.")[1][0]
        for name in unet.state_dict()
        if "up_blocks.1" in name and "attn2." in name
    }
    assert layers == {"0", "1"}


def test_foreign_up_blocks_are_refused() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    before = list(unet.state_dict())
    with pytest.raises(UnsupportedModelError, match="AttnUpBlock2D"):
        PixelAttentionPlugin("pasd", unet)
    assert list(unet.state_dict()) == before


class TestRefusals:
    """What is no PASD checkpoint ends in an error that says why."""

    def edit(self, checkpoint: Path, change: Callable[[dict[str, Tensor]], Any], part: str = "unet") -> None:
        tensors = load_tensors(checkpoint / part / WEIGHTS)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        change(tensors)
        save_tensors(tensors, checkpoint / part / WEIGHTS)

    def test_missing_and_unexpected_keys_are_counted_and_listed(self, checkpoint: Path) -> None:
        def change(tensors: dict[str, Tensor]) -> None:
            for name in [name for name in tensors if "mid_block" in name]:
                tensors[f"extra.{name}"] = tensors.pop(name)

        self.edit(checkpoint, change)
        with pytest.raises(CheckpointError) as caught:
            load_pasd(checkpoint)
        count = sum("mid_block" in name for name in load_tensors(GOLDEN / "pasd" / "unet" / WEIGHTS))
        message = str(caught.value)
        assert f"{count} missing: mid_block.attentions.0" in message
        assert f"{count} unexpected: extra.mid_block.attentions.0" in message
        assert f"and {count - 10} more" in message

    def test_other_shapes(self, checkpoint: Path) -> None:
        self.edit(checkpoint, lambda tensors: tensors.update({"conv_in.weight": torch.zeros(3, 3)}))
        with pytest.raises(CheckpointError, match=r"shape: conv_in.weight is \(3, 3\), not \(16, 4, 3, 3\)"):
            load_pasd(checkpoint)

    def test_config_of_another_size(self, checkpoint: Path) -> None:
        path = checkpoint / "controlnet" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "layers_per_block": 2}))
        with pytest.raises(CheckpointError, match="missing: controlnet_down_blocks"):
            load_pasd(checkpoint)

    def test_rrdb_weights_without_rrdb_in_the_config(self, checkpoint: Path) -> None:
        shutil.copy(GOLDEN / "pasd_rrdb" / "controlnet" / WEIGHTS, checkpoint / "controlnet" / WEIGHTS)
        with pytest.raises(CheckpointError, match="60 unexpected: .*preprocesser"):
            load_pasd(checkpoint)

    def test_stock_unet(self, checkpoint: Path) -> None:
        def change(tensors: dict[str, Tensor]) -> None:
            for name in [name for name in tensors if "pixel_attentions" in name]:
                del tensors[name]

        self.edit(checkpoint, change)
        with pytest.raises(CheckpointError, match="neither of `pixel_attentions` and `attn2_plus`"):
            load_pasd(checkpoint)

    @pytest.mark.parametrize("keep", [0, 5, 1000, -1])
    def test_truncated_weights(self, checkpoint: Path, keep: int) -> None:
        path = checkpoint / "controlnet" / WEIGHTS
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match="controlnet"):
            load_pasd(checkpoint)

    def test_folders_that_are_no_model(self, tmp_path: Path, checkpoint: Path) -> None:
        with pytest.raises(CheckpointError, match="no folder"):
            load_pasd(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match="unet"):
            load_pasd(tmp_path)
        (checkpoint / "controlnet" / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_pasd(checkpoint)

    @pytest.mark.parametrize("text", ["", "{", "[]", '"unet"'])
    def test_damaged_config(self, checkpoint: Path, text: str) -> None:
        (checkpoint / "unet" / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_pasd(checkpoint)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"block_out_chanels": [8]}, "unknown block_out_chanels"),
            ({"_class_name": "AutoencoderKL"}, "AutoencoderKL"),
            ({"norm_num_groups": 7}, "makes no model"),
            ({"down_block_types": ["DownBlock2D"]}, "makes no model"),
            ({"block_out_channels": "wide"}, "makes no model"),
        ],
    )
    def test_configs_that_make_no_model(self, change: dict[str, Any], message: str) -> None:
        unet_config, controlnet_config = configs()
        with pytest.raises(CheckpointError, match=message):
            build_pasd({**unet_config, **change}, controlnet_config)
        with pytest.raises(CheckpointError, match=message):
            build_pasd(unet_config, {**controlnet_config, **change})

    def test_embedding_too_short(self) -> None:
        unet_config, controlnet_config = configs()
        with pytest.raises(CheckpointError, match="at least two widths"):
            build_pasd(unet_config, {**controlnet_config, "conditioning_embedding_out_channels": [16]})
