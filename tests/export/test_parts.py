"""A graph cut into parts: a chain of them is the graph, and each knows what it is to answer."""

from pathlib import Path

import onnx
import pytest
import torch
from blocks_case import PATHS, skipping_case, skipping_onnx

from sdconvert.errors import UsageError
from sdconvert.export.artifact import ExportArtifact, OnnxRunner
from sdconvert.export.blocks import cut_into_blocks
from sdconvert.export.io_manifest import describe_io
from sdconvert.export.parts import cut_into_parts, part_answers
from sdconvert.metrics import sqnr_db
from sdconvert.qnn.chain import Chain


@pytest.mark.parametrize("before", [["up"], ["conv_out", "down"], ["down", "up", "conv_out"]])
def test_a_chain_of_parts_is_the_graph(before: list[str], tmp_path: Path) -> None:
    case, simulation = skipping_case()
    inputs, model = case.samples[0], skipping_onnx()
    onnx.save(model, str(tmp_path / "whole.onnx"))
    cuts = cut_into_parts(model, "net", cut_into_blocks(model, PATHS), before)
    assert [part.name for part, _ in cuts] == [f"net_{number}" for number in range(1, len(before) + 2)]
    assert [path for part, _ in cuts for path in part.blocks] == list(PATHS)
    runners = {}
    for part, cut in cuts:
        onnx.checker.check_model(cut, full_check=True)
        onnx.save(cut, str(tmp_path / f"{part.name}.onnx"))
        runners[part.name] = OnnxRunner(tmp_path / f"{part.name}.onnx")
        described = describe_io(cut, part.name)
        assert [tensor.name for tensor in described] == [*part.inputs, *part.outputs]
    chain = Chain([part for part, _ in cuts], runners, ["y"])
    assert torch.equal(chain(inputs)["y"], OnnxRunner(tmp_path / "whole.onnx")(inputs)["y"])
    leaving = simulation.boundary_tensors(inputs, [key for part, _ in cuts for key in part.outputs.values()])
    for part, _ in cuts:
        entering, fp32, simulated = part_answers(part, inputs, leaving)
        answer = runners[part.name](entering)
        assert list(answer) == list(part.outputs)
        for name, tensor in answer.items():
            assert sqnr_db(simulated[name], tensor) > 60
            assert 30 < sqnr_db(fp32[name], tensor) < 90


def test_what_is_read_later_leaves_its_part_once() -> None:
    model = skipping_onnx()
    (first, _), (second, _), (third, _) = cut_into_parts(model, "net", cut_into_blocks(model, PATHS), ["down", "up"])
    assert first.outputs == {"conv_in_conv2d_0": "conv_in:conv2d.0"}
    # The skip connection passes the second part by.
    assert set(second.inputs) == {"conv_in_conv2d_0"}
    assert set(third.inputs) == {"conv_in_conv2d_0", *second.outputs}
    assert list(third.outputs) == ["y"]


@pytest.mark.parametrize("before", ["conv_in", "up.0"])
def test_a_place_where_no_part_can_begin_is_refused_with_those_where_one_can(before: str) -> None:
    model = skipping_onnx()
    with pytest.raises(UsageError, match=f"net graph cannot be cut before `{before}`") as caught:
        cut_into_parts(model, "net", cut_into_blocks(model, PATHS), ["down", before])
    assert caught.value.hint == "it can be cut before down, up, conv_out"


def test_parts_take_the_place_of_their_graph_among_those_that_are_compiled(tmp_path: Path) -> None:
    model = skipping_onnx()
    parts = [part for part, _ in cut_into_parts(model, "unet", cut_into_blocks(model, PATHS), ["up"])]
    artifact = ExportArtifact(tmp_path)
    (tmp_path / "nodes.json").write_text('{"controlnet": {}, "unet": {}}')
    assert artifact.compiled_graphs() == ["controlnet", "unet"]
    artifact.write_parts("unet", parts)
    assert artifact.parts("unet") == parts
    assert artifact.compiled_graphs() == ["controlnet", "unet_1", "unet_2"]
