"""The full-size model has the original's parameters, and its maker writes what diffusers reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sdconvert.io.tensors import load_tensors
from sdconvert.models.pasd import load_pasd

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/make_fullsize.py"
KEYS = ROOT / "tests/golden/pasd_keys"
SMALL = {"attention_head_dim": 2, "block_out_channels": (8, 16, 16, 16), "cross_attention_dim": 8, "norm_num_groups": 4}


@pytest.fixture(scope="module")
def maker(load_script: Any) -> Any:
    return load_script("make_fullsize")


@pytest.mark.parametrize("graph", ["unet", "controlnet"])
def test_full_size_is_that_of_the_original(maker: Any, graph: str) -> None:
    listed = json.loads((KEYS / f"pasd_full_{graph}_keys.json").read_text())["state_dict"]
    assert {name: list(shape) for name, shape in maker.fullsize_shapes(graph).items()} == listed


def test_a_small_model_of_every_form_is_the_same_and_loads(maker: Any, tmp_path: Path) -> None:
    weights = {
        form: load_tensors(maker.write_fullsize(tmp_path / form, "unet", form, seed=3, sizes=SMALL))
        for form in maker.FORMS
    }
    first = weights["diffusers"]
    for tensors in weights.values():
        assert tensors.keys() == first.keys()
        assert all(torch.equal(tensors[name], first[name]) for name in first)
    (tmp_path / "diffusers").rename(tmp_path / "unet")
    maker.write_fullsize(tmp_path / "controlnet", "controlnet", "diffusers", sizes=SMALL)
    unet, _ = load_pasd(tmp_path)
    assert torch.equal(unet.state_dict()["conv_in.weight"], first["conv_in.weight"])


def test_values_follow_name_and_seed_and_have_the_scale_of_training(maker: Any) -> None:
    weight = maker.values("a.weight", (64, 32, 3, 3), 0)
    assert torch.equal(weight, maker.values("a.weight", (64, 32, 3, 3), 0))
    assert not torch.equal(weight, maker.values("b.weight", (64, 32, 3, 3), 0))
    assert not torch.equal(weight, maker.values("a.weight", (64, 32, 3, 3), 1))
    assert float(weight.std()) == pytest.approx((32 * 9) ** -0.5, rel=0.02)
    assert float(maker.values("norm.weight", (640,), 0).mean()) == pytest.approx(1, abs=0.01)
    assert float(maker.values("a.bias", (640,), 0).mean()) == pytest.approx(0, abs=0.01)


def test_half_types_are_written(maker: Any, tmp_path: Path) -> None:
    path = maker.write_fullsize(tmp_path / "unet", "unet", "pth", dtype="bfloat16", sizes=SMALL)
    assert {tensor.dtype for tensor in load_tensors(path).values()} == {torch.bfloat16}
    assert sorted(file.name for file in path.parent.iterdir()) == ["config.json", "state_dict_mha.pth"]
