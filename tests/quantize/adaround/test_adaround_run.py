"""The whole of it: 2 N forwards, better than nearest, the same in every mode and after a kill, errors that say what."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adaround_graphs import (
    block_adapter,
    block_graph,
    block_grids,
    block_samples,
    int4_grids,
    nearest_weights,
    output_sqnr_db,
    rounded_weights,
)
from torch import Tensor
from torch.fx import GraphModule

from sdconvert.adapters import Tensors
from sdconvert.errors import BudgetError, EnvironmentProblem, PreconditionError, SdconvertError, UsageError
from sdconvert.io.encodings import read_encodings, write_params
from sdconvert.quantize import graph
from sdconvert.quantize.adaround.plan import make_plan
from sdconvert.quantize.adaround.run import AdaRoundResult, AdaRoundSettings, adaround
from sdconvert.quantize.adaround.solve import SolverSettings, solve
from sdconvert.quantize.adaround.steps import SegmentedGraph
from sdconvert.quantize.grid import WeightGrid
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Simulation

SAMPLES = 24
SMALLEST = 800_000  # bytes: the layers with the most columns do not keep their moments in memory


@pytest.fixture(scope="module")
def traced() -> GraphModule:
    return block_graph()


@pytest.fixture(scope="module")
def reference(traced: GraphModule, tmp_path_factory: pytest.TempPathFactory) -> AdaRoundResult:
    return run(traced, tmp_path_factory.mktemp("reference"))


def run(traced: GraphModule, folder: Path, settings: AdaRoundSettings | None = None, **keywords: Any) -> AdaRoundResult:
    grids = int4_grids(traced)
    return adaround(traced, block_samples(SAMPLES), grids, settings or AdaRoundSettings(), folder, **keywords)


def weights(result: AdaRoundResult) -> dict[str, Tensor]:
    """With the biases that changed."""
    return {**dict(result.weights()), **result.biases()}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_each_path_runs_each_sample_once(reference: AdaRoundResult) -> None:
    assert reference.forwards == 2 * SAMPLES
    assert reference.resumed == 0


def test_outputs_are_far_better_than_with_nearest(traced: GraphModule, reference: AdaRoundResult) -> None:
    unseen = block_samples(16, seed=5)
    nearest = output_sqnr_db(traced, nearest_weights(traced, int4_grids(traced)), unseen)
    rounded = output_sqnr_db(traced, weights(reference), unseen)
    assert rounded > nearest + 2
    # The worse of the two outputs is that of one layer, with its bias.
    assert reference.output_sqnr_db == pytest.approx(reference.figures["conv_in.weight"].sqnr_db, abs=0.5)


def test_no_layer_is_worse_than_nearest_on_held_out_data(reference: AdaRoundResult) -> None:
    assert reference.figures.keys() == block_grids().keys()
    for figures in reference.figures.values():
        assert figures.loss <= figures.nearest_loss
        assert figures.held_out_rows > 0
        assert figures.sqnr_db >= figures.nearest_sqnr_db


def test_the_model_s_own_weights_stay(reference: AdaRoundResult, traced: GraphModule) -> None:
    for name, weight in rounded_weights(block_graph()).items():
        assert torch.equal(rounded_weights(traced)[name], weight)
    assert all(not torch.equal(weight, rounded_weights(traced)[name]) for name, weight in reference.weights())


def test_less_memory_gives_the_same_quality(traced: GraphModule, reference: AdaRoundResult, tmp_path: Path) -> None:
    result = run(traced, tmp_path, AdaRoundSettings(budget_bytes=SMALLEST))
    modes = {group.moments.mode for group in result.plan.groups}
    assert "gram" in modes
    assert len(modes) > 1
    assert result.plan.peak_bytes <= SMALLEST < reference.plan.peak_bytes
    unseen = block_samples(16, seed=5)
    levels = [output_sqnr_db(traced, weights(one), unseen) for one in (reference, result)]
    assert levels[1] == pytest.approx(levels[0], abs=0.5)
    assert files(tmp_path) == {f"groups/{group.path.name}" for group in result.groups}


@pytest.mark.parametrize(
    ("settings", "least_gain"),
    [
        (AdaRoundSettings(inputs="fp"), 1),
        (AdaRoundSettings(solver=SolverSettings("adaround")), 1.5),
        (AdaRoundSettings(solver=SolverSettings(refit_scale=True)), 2),
        (AdaRoundSettings(half_precision=False), 2),
    ],
    ids=["fp inputs", "adaround", "refit", "float32"],
)
def test_other_settings(traced: GraphModule, tmp_path: Path, settings: AdaRoundSettings, least_gain: float) -> None:
    result = run(traced, tmp_path, settings)
    unseen = block_samples(16, seed=5)
    nearest = output_sqnr_db(traced, nearest_weights(traced, int4_grids(traced)), unseen)
    assert output_sqnr_db(traced, weights(result), unseen) > nearest + least_gain
    assert result.forwards == (SAMPLES if settings.inputs == "fp" else 2 * SAMPLES)
    refitted = any(not torch.equal(one.grids[name].scale, grid.scale) for one in result.groups
                   for name, grid in int4_grids(traced).items() if name in one.grids)  # fmt: skip
    assert refitted == settings.solver.refit_scale


def test_quantizers_of_a_simulation_count(tmp_path: Path) -> None:
    """With 8-bit activations in the loop the quantized path, and so the codes, are others."""
    samples = block_samples(SAMPLES)
    settings = load_settings({75}).with_bitwidths(weight=4, activation=8, per_channel=True)
    simulation = Simulation(block_adapter(), samples[0], settings)
    simulation.calibrate(samples)
    grids = block_grids()
    results = [
        adaround(simulation.graph_module, samples, grids, AdaRoundSettings(quantizers=active), tmp_path / str(active))
        for active in (False, True)
    ]
    other = weights(results[1])
    assert any(not torch.equal(other[name], weight) for name, weight in results[0].weights())
    plain = run(block_graph(), tmp_path / "plain")
    assert all(torch.equal(weights(plain)[name], weight) for name, weight in results[0].weights())


def test_weights_rounded_elsewhere_are_part_of_the_quantized_path(traced: GraphModule, tmp_path: Path) -> None:
    grids = int4_grids(traced)
    first = {"conv_in.weight": nearest_weights(traced, grids)["conv_in.weight"]}
    rest = {name: grid for name, grid in grids.items() if name not in first}
    samples = block_samples(SAMPLES)
    with_, without = (
        adaround(traced, samples, rest, AdaRoundSettings(), tmp_path / str(index), fixed_weights=fixed)
        for index, fixed in enumerate((first, {}))
    )
    unseen = block_samples(16, seed=5)
    levels = [output_sqnr_db(traced, {**weights(one), **first}, unseen) for one in (with_, without)]
    assert levels[0] > levels[1]


def test_encodings_are_those_that_aimet_takes(traced: GraphModule, reference: AdaRoundResult, tmp_path: Path) -> None:
    """Rounding the rounded weights to nearest, as any reader of the file does, changes nothing."""
    write_params(tmp_path / "parameters_mha.encodings", reference.encodings())
    entries = read_encodings(tmp_path / "parameters_mha.encodings")["param_encodings"]
    for name, weight in reference.weights():
        assert torch.equal(WeightGrid.from_encodings(entries[name], weight.shape).quantize(weight), weight)
        assert {entry["bitwidth"] for entry in entries[name]} == {4}
        assert {entry["offset"] for entry in entries[name]} == {-8}


def run_until_it_kills_itself(work: Callable[[], object]) -> None:
    """Do work in a forked process."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


@pytest.mark.parametrize("at", [1, 8])
def test_a_killed_run_goes_on_to_the_same_codes(
    traced: GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    calls = []

    def dying(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return solve(*arguments)

    settings = AdaRoundSettings(budget_bytes=SMALLEST)
    with monkeypatch.context() as patch:
        patch.setattr("sdconvert.quantize.adaround.run.solve", dying)
        run_until_it_kills_itself(lambda: run(traced, tmp_path / "killed", settings))
    assert any("moments" in name for name in files(tmp_path)) == (at == 8), "of the layer whose moments are on disk"
    resumed, whole = run(traced, tmp_path / "killed", settings), run(traced, tmp_path / "whole", settings)
    assert resumed.resumed == {1: 0, 8: 5}[at]
    assert_same(resumed, whole, tmp_path)
    again = run(traced, tmp_path / "whole", settings)
    assert again.resumed == len(again.groups)
    assert_same(again, resumed, tmp_path)


def assert_same(one: AdaRoundResult, other: AdaRoundResult, folder: Path) -> None:
    assert all(torch.equal(weights(other)[name], weight) for name, weight in one.weights())
    assert one.figures == other.figures
    assert one.output_sqnr_db == other.output_sqnr_db
    assert files(folder / "killed") == files(folder / "whole") == {f"groups/{group.path.name}" for group in one.groups}


def test_another_request_begins_anew_and_sweeps(traced: GraphModule, tmp_path: Path) -> None:
    run(traced, tmp_path)
    (tmp_path / "groups" / ".partial-x.safetensors").write_bytes(b"half")
    before = files(tmp_path)
    other = run(traced, tmp_path, AdaRoundSettings(solver=SolverSettings(damping=(0.2,))))
    assert other.resumed == 0
    assert not files(tmp_path) & before


def broken_samples(change: Callable[[list[Tensors]], None]) -> list[Tensors]:
    samples = block_samples(4)
    change(samples)
    return samples


REFUSED: dict[str, tuple[list[Tensors], dict[str, Any], type[SdconvertError], str]] = {
    "no samples": ([], {}, PreconditionError, "0 calibration samples"),
    "another size": (
        broken_samples(lambda s: s[2].update(x=torch.zeros(1, 3, 4, 4))),
        {},
        UsageError,
        r"calibration sample 2 .* `x` of shape \(1, 3, 8, 8\)",
    ),
    "another model": (
        broken_samples(lambda s: s[1].update(y=torch.zeros(1))),
        {},
        UsageError,
        "calibration sample 1",
    ),
    "not a number": (
        broken_samples(lambda s: s[3]["text"].__setitem__((0, 2, 5), float("nan"))),
        {},
        UsageError,
        "input of `key.weight` is not finite in calibration sample 3",
    ),
    "squares beyond float32": (
        broken_samples(lambda s: s[1]["text"].mul_(1e21)),
        {},
        UsageError,
        "input of `key.weight` is so large",
    ),
    "budget below a sample": (block_samples(4), {"budget_bytes": 1000}, BudgetError, "one sample takes"),
    "budget below a layer": (block_samples(4), {"budget_bytes": 350_000}, BudgetError, "`down.weight` with 288 inputs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_what_and_where(traced: GraphModule, tmp_path: Path, case: str) -> None:
    samples, settings, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as found:
        adaround(traced, samples, int4_grids(traced), AdaRoundSettings(**settings), tmp_path)
    assert found.value.hint
    assert not [name for name in files(tmp_path) if not name.startswith("groups/")]


def test_nothing_to_round_is_refused(traced: GraphModule, tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="no weights"):
        adaround(traced, block_samples(4), {}, AdaRoundSettings(), tmp_path)


def test_a_full_disk_keeps_what_is_done(traced: GraphModule, small_disk: Path, tmp_path: Path) -> None:
    """The disk fills up with waiting tensors; with room enough the run goes on from the groups that were done."""
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 40_000)
    settings = AdaRoundSettings(budget_bytes=SMALLEST)
    with pytest.raises(EnvironmentProblem, match="no space left"):
        run(traced, small_disk / "run", settings)
    assert not (small_disk / "run" / "activations").exists()


def test_a_plan_needs_no_data(traced: GraphModule) -> None:
    segmented = SegmentedGraph(traced, int4_grids(traced))
    plan = make_plan(segmented, samples=1000, held_out=100, budget_bytes=1 << 20)
    assert [layer.name for group in plan.groups for layer in group.layers] == list(int4_grids(traced))
    assert plan.peak_bytes <= 1 << 20
    assert plan.disk_bytes > 5 << 20
    few = make_plan(segmented, samples=10, held_out=1, budget_bytes=1 << 20)
    assert max(group.peak_bytes for group in few.groups) <= 1 << 20
    assert "AdaRound of 8 layers in 7 groups" in plan.describe()


def test_an_unknown_weight_is_refused(traced: GraphModule, tmp_path: Path) -> None:
    grids = int4_grids(traced)
    with pytest.raises(UsageError, match="`absent.weight`"):
        adaround(
            traced, block_samples(4), {**grids, "absent.weight": grids["query.weight"]}, AdaRoundSettings(), tmp_path
        )
    assert {parameter.name for parameter in graph.parameters(traced)} > grids.keys()
