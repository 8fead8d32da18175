"""A graph cut into blocks: what enters and leaves each, and what these tensors hold."""

from pathlib import Path

import onnx
import pytest
import torch
from blocks_case import PATHS, Skipping, skipping_case, skipping_onnx
from onnx.utils import Extractor

from sdconvert.errors import UsageError
from sdconvert.export.artifact import ExportArtifact, OnnxRunner
from sdconvert.export.blocks import cut_into_blocks


def test_a_block_has_what_it_reads_of_others_and_what_others_read_of_it() -> None:
    first, *rest = blocks = cut_into_blocks(skipping_onnx(), PATHS)
    assert [block.path for block in blocks] == list(PATHS)
    assert first.inputs == {":x": "x"}
    assert list(first.outputs) == ["conv_in:conv2d.0"]
    down, up, last = rest
    assert list(down.inputs) == ["conv_in:conv2d.0"]
    # The concatenation lies between blocks: it belongs to the one that reads it.
    assert set(up.inputs) == {"down.2:conv2d.0", "conv_in:conv2d.0"}
    # The factor lies behind the last one.
    assert last.outputs == {":mul.0": "y"}


def test_a_chain_of_blocks_is_the_graph(tmp_path: Path) -> None:
    case, model = skipping_case()[0], skipping_onnx()
    onnx.save(model, str(tmp_path / "whole.onnx"))
    whole = OnnxRunner(tmp_path / "whole.onnx")(case.samples[0])["y"]
    extractor, tensors = Extractor(model), {":x": case.samples[0]["x"]}
    for block in cut_into_blocks(model, PATHS):
        part = extractor.extract_model(list(block.inputs.values()), list(block.outputs.values()))
        onnx.save(part, str(tmp_path / "part.onnx"))
        answer = OnnxRunner(tmp_path / "part.onnx")({name: tensors[key] for key, name in block.inputs.items()})
        tensors |= {key: answer[name] for key, name in block.outputs.items()}
    assert torch.equal(tensors[":mul.0"], whole)


def test_boundaries_hold_simulation_fp32_and_the_block_alone(tmp_path: Path) -> None:
    case, simulation = skipping_case()
    model, inputs = skipping_onnx(), case.samples[0]
    blocks = cut_into_blocks(model, PATHS)
    keys = [key for block in blocks for key in block.outputs]
    artifact = ExportArtifact(tmp_path)
    artifact.write_blocks("module", blocks, simulation.boundary_tensors(inputs, keys))
    assert artifact.blocks("module") == blocks
    found = artifact.boundaries("module")
    module = case.adapter.model
    assert isinstance(module, Skipping)
    assert torch.equal(found["simulated"][":mul.0"], simulation(inputs)["y"])
    with torch.no_grad():
        torch.testing.assert_close(found["fp32"]["conv_in:conv2d.0"], module.conv_in(inputs["x"]))
        torch.testing.assert_close(found["fp32"][":mul.0"], module(inputs["x"]))
        alone = module.down(found["simulated"]["conv_in:conv2d.0"])
        torch.testing.assert_close(found["fp32_block"]["down.2:conv2d.0"], alone)
    assert not torch.equal(found["fp32_block"]["down.2:conv2d.0"], found["fp32"]["down.2:conv2d.0"])


def test_a_tensor_that_does_not_exist_is_named() -> None:
    case, simulation = skipping_case()
    with pytest.raises(UsageError, match="`down:gelu.0` is no tensor of the module graph"):
        simulation.boundary_tensors(case.samples[0], ["down:gelu.0"])
