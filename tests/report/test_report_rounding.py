"""What the report tells where weights were rounded by AdaRound, and where bit-widths were chosen per layer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from made_report import make_report
from tiny_run import GRAPHS, RECIPE, copy_run

from sdconvert.artifacts import RunFolder
from sdconvert.config import Recipe
from sdconvert.io.files import read_json, write_json_atomic
from sdconvert.io.tensors import load_tensors, save_tensors


@pytest.fixture(scope="module")
def rounded(finished: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = copy_run(finished, tmp_path_factory.mktemp("rounded") / "run")
    folder = run.stage_folder("30-quantize")
    layers = {
        f"conv_{index}.weight": {"loss": 1.0, "nearest_loss": 2.0, "nearest_sqnr_db": 20.0, "sqnr_db": 23.0 + index}
        for index in range(3)
    }
    for graph in GRAPHS:
        content = {"plan": "a plan", "predicted_peak_bytes": 5 << 20, "forwards": 64.0, "layers": layers}
        write_json_atomic(content, folder / graph / "adaround.json")
    for path in (folder / "pictures").glob("*.safetensors"):
        own = {name: tensor.clone() for name, tensor in load_tensors(path).items()}
        save_tensors(own | {"nearest": (own["quantized"] + 0.01 * torch.randn(own["quantized"].shape))}, path)
    manifest = read_json(folder / "manifest.json")
    manifest["metrics"] |= {f"{graph}_nearest_vs_fp32_db": 31.5 for graph in GRAPHS}
    write_json_atomic(manifest, folder / "manifest.json")
    return run


def test_every_graph_s_gain_is_told(rounded: RunFolder) -> None:
    report = make_report(rounded)
    figures = report.artifact.figures()
    assert figures["rounding"].keys() == set(GRAPHS)
    expected = {
        "nearest_db": 31.5,
        "adaround_db": 38.5,
        "layers": 3,
        "worse_than_nearest": 0,
        "median_gain_db": 4.0,
        "forwards": 64.0,
        "predicted_peak_bytes": 5 << 20,
    }
    assert figures["rounding"]["unet"] == expected
    assert "Rounding of the weights" in report.page.text
    assert "7.0 dB" in report.page.text
    assert "rounded to nearest" in report.page.text
    assert figures["pictures"]["china"]["nearest"].keys() == {"psnr_y_db", "ssim_y", "psnr_vs_fp32_db"}


def test_size_is_shown_against_quality(rounded: RunFolder, tmp_path: Path) -> None:
    layers: dict[str, Any] = {
        f"conv_{index}.weight": {
            "weights": 1000,
            "output_db": {"4": 10.0 * (index + 1), "8": 60.0},
            "picture_db": {"4": 11.0 * (index + 1), "8": 61.0},
        }
        for index in range(2)
    }
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps({"identity": "", "graphs": {"unet": {"layers": layers, "cumulative": {}}}}))
    changes = {
        "quantize": {"layers": {"unet:conv_1": {"weight_bitwidth": 4}}},
        "report": {"sensitivity": str(path)},
    }
    recipe = Recipe.model_validate({**RECIPE.model_dump(), **changes})
    report = make_report(copy_run(rounded, tmp_path / "run"), recipe)
    sizes = report.artifact.figures()["size_quality"]
    assert [bits for bits, _ in sizes["points"]] == [8, 6, 4]
    assert sizes["chosen"] == sizes["points"][1]
    assert sizes["chosen"][1] == pytest.approx(22, abs=0.01)
    assert "Size against quality" in report.page.text
    assert "6 bits per weight, 22.0 dB predicted" in " ".join(report.page.text.split())
    assert "the best choice" in report.page.text.lower()
