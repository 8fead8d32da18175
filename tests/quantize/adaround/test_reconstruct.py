"""A block's loss and gradient are those of the layer problem; what training gives is judged, and is the same again."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from adaround_cases import channels_of
from adaround_graphs import (
    block_adapter,
    block_graph,
    block_grids,
    block_samples,
    int4_grids,
    nearest_weights,
    rounded_weights,
)
from torch import Tensor
from torch.fx import GraphModule

from sdconvert.errors import BudgetError
from sdconvert.metrics import sqnr_db
from sdconvert.quantize import graph
from sdconvert.quantize.adaround.advance import Frontiers
from sdconvert.quantize.adaround.blocks import Block, find_blocks
from sdconvert.quantize.adaround.moments import GramMoments, LayerGroup
from sdconvert.quantize.adaround.plan import make_plan
from sdconvert.quantize.adaround.reconstruct import BlockTask, Drop, Reconstruction, SoftWeights, Start
from sdconvert.quantize.adaround.run import AdaRoundResult, AdaRoundSettings, adaround
from sdconvert.quantize.adaround.soft import Schedule
from sdconvert.quantize.adaround.solve import LayerFigures, SolverSettings
from sdconvert.quantize.adaround.steps import SegmentedGraph
from sdconvert.quantize.adaround.store import ActivationStore
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simplify import attribute
from sdconvert.quantize.simulation import Simulation

SAMPLES = 12
WHOLE = ("",)  # the graph itself is a block, of all layers
SHORT = Reconstruction(paths=WHOLE, schedule=Schedule(iterations=12, learning_rate=0.3))
FIGURES = LayerFigures(0.1, False, 0.0, 1, 1.0, 1.0, 1.0)


def run(traced: GraphModule, folder: Path, reconstruct: Reconstruction | None, **keywords: Any) -> AdaRoundResult:
    report = keywords.pop("report", None)
    settings = AdaRoundSettings(reconstruct=reconstruct, **keywords)
    extra = {"report": report} if report else {}
    return adaround(traced, block_samples(SAMPLES), block_grids(), settings, folder, **extra)


def simulated() -> Simulation:
    samples = block_samples(SAMPLES)
    settings = load_settings({75}).with_bitwidths(weight=4, activation=8, per_channel=True)
    simulation = Simulation(block_adapter(), samples[0], settings)
    simulation.calibrate(samples)
    return simulation


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def task_at(traced: GraphModule, block_of: Any, folder: Path, **options: Any) -> Iterator[tuple[BlockTask, Frontiers]]:
    """A block's task, with nearest weights before it."""
    rounded = nearest_weights(block_graph(), block_grids())
    segmented = SegmentedGraph(traced, rounded)
    block: Block = block_of(segmented)
    with ActivationStore(1 << 30, folder / "store", torch.float32) as store, torch.no_grad():
        quantizers = options.get("quantizers", False)
        frontiers = Frontiers(segmented, store, sequential=True, quantizers=quantizers, weights=rounded)
        frontiers.ingest(block_samples(4), str)
        for index in range(block.first + 1):
            frontiers.advance(index, rounded.get)
        yield (
            BlockTask(block, segmented, frontiers, store, samples=4, quantizers=quantizers, weights=rounded.get),
            frontiers,
        )


def one_layer(name: str) -> Any:
    """A block that is nothing but a layer."""

    def block_of(segmented: SegmentedGraph) -> Block:
        index = next(i for i, group in enumerate(segmented.groups) if group.layers[0].name == name)
        group = segmented.groups[index]
        steps = tuple(step for step in segmented.steps if step.output is group.nodes[0])
        return Block(name, index, index, steps, (group.input,), (group.nodes[0],), group.layers[:1])

    return block_of


def whole(segmented: SegmentedGraph) -> Block:
    return find_blocks(segmented, "block", paths=WHOLE)[0]


@pytest.mark.parametrize("name", ["grouped.weight", "down.weight", "proj.weight", "conv_out.weight"])
def test_a_block_of_one_layer_is_the_layer_s_problem(name: str, tmp_path: Path) -> None:
    """Loss and gradient from samples are the quadratic form's and its gradient, 2 (D G - R)."""
    traced = block_graph()
    weight = rounded_weights(traced)[name]
    candidate = nearest_weights(traced, int4_grids(traced))[name]
    with task_at(traced, one_layer(name), tmp_path) as (task, frontiers):
        samples = range(4)
        energy = task.mean_energy(samples)
        mean_energy = next(iter(energy.values()))
        leaf = candidate.clone().requires_grad_()
        error = task.backward({name: leaf}, list(samples), energy, Drop(0.0, torch.Generator())) * mean_energy
        group = next(group for group in SegmentedGraph(traced, [name]).groups)
        group = dataclasses.replace(group, input=task.block.inputs[0])
        assert leaf.grad is not None
        losses, gradients = [], []
        for part in range(group.layers[0].groups):
            layers = LayerGroup(group.layers, [weight], part)
            moments = GramMoments.of(layers, lambda: frontiers.inputs_of(group, list(samples)))
            rows = group.layers[0].rows_of_group(part)
            channels = channels_of(weight[rows].flatten(1))
            channels = dataclasses.replace(channels, rows=slice(0, len(channels.weight)))
            delta = (candidate - weight)[rows].flatten(1)
            losses.append(moments.loss(channels, delta).sum() * moments.count / 4)
            gradients.append(2 * moments.full_gradient(channels, delta) * moments.count / 4 / mean_energy)
        assert error == pytest.approx(float(sum(losses)), rel=1e-4)
        assert task.loss({name: candidate}, list(samples)) * mean_energy == pytest.approx(error, rel=1e-4)
        torch.testing.assert_close(leaf.grad.flatten(1), torch.cat(gradients), rtol=1e-3, atol=1e-5)


def starts(traced: GraphModule, block: Block) -> dict[str, Start]:
    weights, grids = rounded_weights(traced), int4_grids(traced)
    names = [layer.name for layer in block.layers]
    return {
        name: Start(weights[name], grids[name].nearest(weights[name].flatten(1)), grids[name], FIGURES)
        for name in names
    }


def test_the_gradient_of_soft_roundings_is_that_of_finite_differences(tmp_path: Path) -> None:
    """Through attention, GEGLU, convolutions and two outputs, with the regulariser."""
    traced = block_graph()
    with task_at(traced, whole, tmp_path) as (task, _):
        assert len(task.block.layers) == 8
        soft, samples = SoftWeights(starts(traced, task.block), 0.5), [0, 1, 2, 3]
        energy, drop = task.mean_energy(samples), Drop(0.0, torch.Generator())

        def value() -> float:
            regularizer = sum(float(block.regularizer(4.0).detach()) for block in soft.blocks.values())
            return (
                task.loss({name: leaf.detach() for name, leaf in soft.leaves().items()}, samples) + 1e-4 * regularizer
            )

        leaves = soft.leaves()
        task.backward(leaves, samples, energy, drop)
        soft.backward(leaves, 4.0, 1e-4)
        for seed, (name, block) in enumerate(soft.blocks.items()):
            assert block.alpha.grad is not None
            direction = torch.randn(block.alpha.shape, generator=torch.Generator().manual_seed(seed))
            direction = direction + 3 * block.alpha.grad / block.alpha.grad.norm() * direction.norm()
            expected = float((block.alpha.grad * direction).sum())
            step = 0.02 / float(direction.abs().max())
            own = block.alpha.data
            block.alpha.data = own + step * direction
            above = value()
            block.alpha.data = own - step * direction
            below = value()
            block.alpha.data = own
            assert (above - below) / (2 * step) == pytest.approx(expected, rel=0.02), name
        soft.remove()


def test_training_begins_with_the_codes_it_is_given(tmp_path: Path) -> None:
    traced = block_graph()
    moments = run(traced, tmp_path / "moments", None)
    none = dataclasses.replace(SHORT, schedule=Schedule(iterations=0))
    result = run(traced, tmp_path / "none", none)
    (block,) = result.blocks
    assert block.changed == 0
    assert block.reconstruction_loss == block.moments_loss
    again = dict(result.weights())
    assert all(torch.equal(again[name], weight) for name, weight in moments.weights())


@pytest.mark.parametrize("rate", [0.3, 50.0], ids=["trained", "spoiled"])
def test_the_best_on_held_out_samples_is_taken(rate: float, tmp_path: Path) -> None:
    traced = block_graph()
    schedule = Schedule(iterations=30, learning_rate=rate, regularization=0.0)
    # With so much damping moments hardly leave the nearest codes, and there is something to gain.
    solver = SolverSettings(damping=(30.0,))
    result = run(traced, tmp_path, dataclasses.replace(SHORT, schedule=schedule), solver=solver)
    (block,) = result.blocks
    losses = {"nearest": block.nearest_loss, "moments": block.moments_loss, "reconstruction": block.reconstruction_loss}
    assert losses[block.taken] == min(losses.values())
    assert block.taken == ("reconstruction" if rate < 1 else "moments")
    assert (block.changed > 0) == (block.taken == "reconstruction")
    assert result.figures.keys() == int4_grids(traced).keys()


def test_nearest_is_judged_with_the_model_s_own_biases(tmp_path: Path) -> None:
    """As it is what a simulation would do without AdaRound, and as it is committed."""
    traced = block_graph()
    losses = [
        run(traced, tmp_path / str(correct), SHORT, correct_bias=correct).blocks[0].nearest_loss
        for correct in (True, False)
    ]
    assert losses[0] == losses[1]


def test_the_frontier_goes_on_with_what_was_taken(tmp_path: Path) -> None:
    """What the run itself saw at the graph's end is what the model with these weights computes."""
    traced = block_graph()
    early = Reconstruction("layer+activation", schedule=Schedule(iterations=30, learning_rate=0.3, regularization=0))
    for name, settings in {"whole": SHORT, "layers": early}.items():
        result = run(traced, tmp_path / name, settings, half_precision=False)
        samples = block_samples(SAMPLES)
        judging = [samples[index] for index in AdaRoundSettings().held_out_samples(SAMPLES)]
        reference = [traced(*sample.values()) for sample in judging]
        rounded = block_graph()
        nodes = {parameter.name: parameter.node for parameter in graph.parameters(rounded)}
        with torch.no_grad():
            for key, value in {**dict(result.weights()), **result.biases()}.items():
                attribute(rounded, nodes[key]).copy_(value)
            outputs = [rounded(*sample.values()) for sample in judging]
            levels = [
                sqnr_db(torch.stack([one[k] for one in reference]), torch.stack([one[k] for one in outputs]))
                for k in range(2)
            ]
        assert result.output_sqnr_db == pytest.approx(min(levels), abs=0.01)


def test_what_escapes_quantizers_depends_on_the_seed_alone(tmp_path: Path) -> None:
    simulation = simulated()
    settings = dataclasses.replace(SHORT, schedule=Schedule(iterations=8, learning_rate=0.3, regularization=0))
    variants = {
        "first": settings,
        "again": settings,
        "seed": dataclasses.replace(settings, seed=1),
        "none": dataclasses.replace(settings, drop=0.0),
    }
    losses = {
        name: run(simulation.graph_module, tmp_path / name, one, quantizers=True).blocks[0].reconstruction_loss
        for name, one in variants.items()
    }
    assert losses["first"] == losses["again"]
    assert len({losses["first"], losses["seed"], losses["none"]}) == 3
    first, again = (files(tmp_path / name) for name in ("first", "again"))
    assert first == again


class Stopped(Exception):
    """As a kill would be, but for what is closed in passing."""


@pytest.mark.parametrize("settings", [SHORT, Reconstruction("layer+activation", schedule=SHORT.schedule)])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(settings: Reconstruction, tmp_path: Path) -> None:
    traced = block_graph()
    expected = run(traced, tmp_path / "whole", settings)
    folder = tmp_path / "stopped"
    for stop in range(1, 7):

        def report(done: int, total: int, note: str, stop: int = stop) -> None:
            if done == stop:
                raise Stopped

        with pytest.raises(Stopped):
            run(traced, folder, settings, report=report)
    result = run(traced, folder, settings)
    assert files(folder) == files(tmp_path / "whole")
    assert [group.layers.keys() for group in result.groups] == [group.layers.keys() for group in expected.groups]
    assert result.blocks == expected.blocks
    finished = run(traced, folder, settings)
    assert finished.resumed == 7
    assert finished.blocks == expected.blocks
    assert finished.output_sqnr_db == expected.output_sqnr_db


def test_groups_of_a_finished_block_that_a_kill_left_are_swept(tmp_path: Path) -> None:
    """Killed between the block's commit and the removal of what it replaces."""
    traced, kept = block_graph(), {}

    def report(done: int, total: int, note: str) -> None:
        kept.update(files(tmp_path))

    expected = run(traced, tmp_path, SHORT, report=report)
    final = files(tmp_path)
    stale = {name: data for name, data in kept.items() if name.startswith("groups/")}
    assert len(stale) == 6
    for name, data in stale.items():
        (tmp_path / name).write_bytes(data)
    assert run(traced, tmp_path, SHORT).blocks == expected.blocks
    assert files(tmp_path) == final


@pytest.mark.parametrize("quantizers", [False, True], ids=["plain", "quantizers"])
def test_what_is_kept_for_the_way_back_is_in_the_plan(quantizers: bool, tmp_path: Path) -> None:
    traced = simulated().graph_module if quantizers else block_graph()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with task_at(traced, whole, tmp_path, quantizers=quantizers) as (task, _):
        leaves = {layer.name: torch.zeros(layer.weight_shape).requires_grad_() for layer in task.block.layers}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            task.backward(leaves, [0], task.mean_energy([0]), Drop(0.5, torch.Generator()))
        plan = make_plan(
            SegmentedGraph(traced, block_grids()),
            samples=4,
            held_out=1,
            budget_bytes=1 << 30,
            blocks=[task.block],
            quantizers=quantizers,
        )
    weights = 4 * sum(layer.out_channels * layer.columns for layer in task.block.layers)
    (block,) = plan.blocks
    assert sum(kept.values()) < block.peak_bytes - 13 * weights


def test_a_budget_below_a_block_names_it(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"the 8 layers of block `` need .* MiB together") as found:
        run(block_graph(), tmp_path, SHORT, budget_bytes=700_000)
    assert "smaller blocks" in found.value.hint


def test_the_plan_tells_of_blocks() -> None:
    traced = block_graph()
    segmented = SegmentedGraph(traced, int4_grids(traced))
    blocks = find_blocks(segmented, "layer+activation")
    options: Mapping[str, Any] = {"samples": 1000, "held_out": 100, "budget_bytes": 1 << 20}
    plan = make_plan(segmented, **options, blocks=blocks)
    assert [block.name for block in plan.blocks] == ["conv_in.weight", "grouped.weight", "proj.weight"]
    assert "3 again in 3 blocks" in plan.describe()
    assert plan.disk_bytes > make_plan(segmented, **options).disk_bytes
