"""Every kind of thing on the road is recognized, and nothing else is."""

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from sdconvert.artifacts import Manifest, describe_outputs
from sdconvert.cli.inspect import _compare, _recognize
from sdconvert.errors import CheckpointError, UsageError
from sdconvert.io.files import write_json_atomic
from sdconvert.io.tensors import save_tensors

WEIGHTS = {"conv.weight": torch.zeros(4, 3), "conv.bias": torch.zeros(4), "norm.weight": torch.zeros(2)}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_weights(tmp_path: Path, suffix: str) -> None:
    save_tensors(WEIGHTS, tmp_path / f"w{suffix}")
    kind, describe = _recognize(tmp_path / f"w{suffix}")
    data, table = describe(tmp_path / f"w{suffix}")
    assert (kind, data["tensors"], data["parameters"]) == ("weights", 3, 18)
    assert table.rows[0] == ("conv", 2, "16")


def test_model_and_checkpoint(tmp_path: Path) -> None:
    for name, stem, config in [
        ("unet", "diffusion_pytorch_model", {"_class_name": "UNet2DConditionModel"}),
        ("text_encoder", "model", {"architectures": ["CLIPTextModel"]}),
    ]:
        write_json_atomic(config, tmp_path / name / "config.json")
        save_tensors(WEIGHTS, tmp_path / name / f"{stem}.safetensors")
    write_json_atomic({"_class_name": "StableDiffusionPipeline"}, tmp_path / "model_index.json")
    kind, describe = _recognize(tmp_path / "unet")
    assert (kind, describe(tmp_path / "unet")[0]["class"]) == ("model", "UNet2DConditionModel")
    kind, describe = _recognize(tmp_path)
    data, _ = describe(tmp_path)
    assert kind == "checkpoint"
    assert {name: part["class"] for name, part in data["components"].items()} == {
        "text_encoder": "CLIPTextModel",
        "unet": "UNet2DConditionModel",
    }


def test_onnx(tmp_path: Path) -> None:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "n"]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), tmp_path / "m.onnx")
    kind, describe = _recognize(tmp_path / "m.onnx")
    data, _ = describe(tmp_path / "m.onnx")
    assert kind == "onnx"
    assert data == {
        "opset": {"ai.onnx": 21},
        "nodes": 1,
        "operators": {"Relu": 1},
        "inputs": {"x": [1, "n"]},
        "outputs": {"y": [1, "n"]},
    }


def _write_onnx(path: Path, *operators: str) -> Path:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("t0", f"t{len(operators)}")]
    nodes = [helper.make_node(operator, [f"t{n}"], [f"t{n + 1}"]) for n, operator in enumerate(operators)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", value[:1], value[1:])), path)
    return path


def test_two_graphs_are_compared_node_type_by_node_type(tmp_path: Path) -> None:
    before = _write_onnx(tmp_path / "a.onnx", "Transpose", "Transpose", "Relu", "Transpose")
    after = _write_onnx(tmp_path / "b.onnx", "Relu", "Sigmoid")
    data, table = _compare(before, after)
    assert data["nodes"] == {"before": 4, "after": 2, "difference": -2}
    assert data["operators"] == {
        "Transpose": {"before": 3, "after": 0, "difference": -3},
        "Sigmoid": {"before": 0, "after": 1, "difference": 1},
        "Relu": {"before": 1, "after": 1, "difference": 0},
    }
    assert table.rows[0] == ("Transpose", "3", "0", "-3")
    assert table.rows[-1] == ("all", "4", "2", "-2")


def test_only_graphs_of_one_kind_are_compared(tmp_path: Path) -> None:
    graph = _write_onnx(tmp_path / "a.onnx", "Relu")
    save_tensors(WEIGHTS, tmp_path / "w.safetensors")
    (tmp_path / "unet_qnn.bin").write_bytes(b"not read")
    for other in (tmp_path / "w.safetensors", tmp_path / "unet_qnn.bin"):
        with pytest.raises(UsageError, match="give two|is onnx and"):
            _compare(graph, other)
    with pytest.raises(UsageError, match="says nothing about its nodes") as error:
        _compare(tmp_path / "unet_qnn.bin", tmp_path / "unet_qnn.bin")
    assert "`unet.nodes.json` is missing" in error.value.hint
    write_json_atomic({"Conv2d": 3}, tmp_path / "unet.nodes.json")
    data, _ = _compare(tmp_path / "unet_qnn.bin", tmp_path / "unet_qnn.bin")
    assert data["operators"] == {"Conv2d": {"before": 3, "after": 3, "difference": 0}}


def test_stage_and_run(tmp_path: Path) -> None:
    stage = tmp_path / "30-quantize"
    save_tensors(WEIGHTS, stage / "w.pth")
    Manifest(
        stage="30-quantize",
        fingerprint="f",
        inputs={},
        outputs=describe_outputs(stage),
        settings={},
        versions={},
        metrics={"sqnr_db": 40.0},
        seconds=2,
        peak_rss_bytes=1 << 30,
    ).save(stage)
    (tmp_path / "recipe.resolved.yaml").touch()
    kind, describe = _recognize(stage)
    data, table = describe(stage)
    assert (kind, list(data["outputs"])) == ("stage", ["w.pth"])
    assert ("metric", "sqnr_db", "40.0") in table.rows
    kind, describe = _recognize(tmp_path)
    data, table = describe(tmp_path)
    assert kind == "run"
    assert [row[0] for row in table.rows] == list(data["stages"]) == ["30-quantize"]


def test_anything_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UsageError, match="none of the things"):
            _recognize(path)
    (tmp_path / "w.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError):
        _recognize(tmp_path / "w.safetensors")[1](tmp_path / "w.safetensors")
