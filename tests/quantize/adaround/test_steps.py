"""Segments one after the other are the graph; groups are layers of one input; attention in parts is the same."""

from pathlib import Path

import pytest
import torch
from adaround_graphs import block_adapter, block_graph, block_samples, rounded_weights
from static_graphs import shared_trace

from sdconvert.errors import UsageError
from sdconvert.quantize.adaround import steps
from sdconvert.quantize.adaround.advance import FLOATING, QUANTIZED, Frontiers
from sdconvert.quantize.adaround.steps import SegmentedGraph
from sdconvert.quantize.adaround.store import ActivationStore
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Simulation


def test_groups_are_layers_of_one_input_in_execution_order() -> None:
    graph_module = block_graph()
    segmented = SegmentedGraph(graph_module, rounded_weights(graph_module))
    groups = [[layer.name for layer in group.layers] for group in segmented.groups]
    assert groups == [
        ["conv_in.weight"],
        ["grouped.weight"],
        ["query.weight"],
        ["key.weight", "value.weight"],
        ["proj.weight"],
        ["down.weight"],
        ["conv_out.weight"],
    ]
    grouped, down = segmented.groups[1].layers[0].convolution, segmented.groups[5].layers[0].convolution
    assert grouped is not None
    assert down is not None
    assert (grouped.groups, grouped.padding, down.stride, down.kernel) == (2, (1, 1), (2, 2), (3, 3))


def test_every_step_is_in_one_segment_and_every_value_is_read_after_it_was_made() -> None:
    """PASD's UNet, with every kind of attention."""
    graph_module = shared_trace("unet")
    segmented = SegmentedGraph(graph_module, rounded_weights(graph_module))
    assert [step for segment in segmented.segments for step in segment] == segmented.steps
    made = set(segmented.inputs)
    for index, segment in enumerate(segmented.segments):
        assert made >= set(segmented.reads[index])
        for step in segment:
            assert made >= set(step.inputs)
            made.add(step.output)
        if index < len(segmented.groups):
            assert segmented.groups[index].input in made
    assert {len(step.nodes) for step in segmented.steps} == {1, 3}, "attention runs as one step"


@pytest.mark.parametrize("scores_bytes", [1 << 30, 256])
@pytest.mark.parametrize("quantizers", [False, True], ids=["plain", "simulation"])
def test_segments_are_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantizers: bool, scores_bytes: int
) -> None:
    """On the floating-point path a simulation's quantizers do nothing; on the quantized one they are its own."""
    monkeypatch.setattr(steps, "SCORES_BYTES", scores_bytes)
    samples, plain = block_samples(3), block_graph()
    segmented, simulation = SegmentedGraph(plain, ["query.weight", "down.weight"]), None
    if quantizers:
        simulation = Simulation(block_adapter(), samples[0], load_settings({75}))
        simulation.calibrate(samples)
        segmented = SegmentedGraph(simulation.graph_module, ["query.weight", "down.weight"])
    attentions = [step for step in segmented.steps if len(step.nodes) > 1]
    assert [step.query_rows for step in attentions] == [scores_bytes // 20]
    with ActivationStore(1 << 30, tmp_path / "store", torch.float32) as store, torch.no_grad():
        frontiers = Frontiers(segmented, store, sequential=True, quantizers=quantizers, weights=())
        frontiers.ingest(samples, str)
        for index in range(len(segmented.groups)):
            frontiers.advance(index, lambda name: None)
        found = list(frontiers.outputs(lambda name: None))
        assert len(store) == 0
        # Without quantizers the paths are the same, and only one of them runs up to the last segment.
        assert frontiers.forwards == 2 * len(samples) if quantizers else frontiers.forwards < 2 * len(samples)
        for sample, outputs in zip(samples, found, strict=True):
            expected = plain(*sample.values())
            torch.testing.assert_close(outputs[FLOATING], list(expected), rtol=1e-5, atol=1e-5)
            if simulation:
                expected = simulation(sample).values()
            torch.testing.assert_close(outputs[QUANTIZED], list(expected), rtol=1e-5, atol=1e-3 if simulation else 1e-5)
            assert torch.equal(outputs[FLOATING][1], outputs[QUANTIZED][1]) != quantizers


def test_weights_of_no_layer_are_refused() -> None:
    graph_module = block_graph()
    for name in ("other.weight", "query.bias"):
        with pytest.raises(UsageError, match=f"1 weights .* `{name}`"):
            SegmentedGraph(graph_module, [name, "query.weight"])


def test_the_paths_part_at_the_first_rounded_layer() -> None:
    graph_module = block_graph()
    segmented = SegmentedGraph(graph_module, ["query.weight"])
    differing = segmented.differing(quantizers=False, weights=["query.weight"])
    (group,) = segmented.groups
    assert group.input not in differing
    assert group.nodes[0] in differing
    hidden, output = segmented.outputs
    assert hidden not in differing
    assert output in differing
    assert block_samples(1)[0].keys() == {node.name for node in segmented.inputs}
