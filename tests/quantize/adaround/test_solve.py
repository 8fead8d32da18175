"""The solvers: on the grid, next to the weight, better than nearest, near the best where all can be tried."""

import itertools
from pathlib import Path

import pytest
import torch
from adaround_cases import LAYERS, MODES, Data, channels_of, int4_grid, layer_group, make_moments, matrix
from torch import Tensor

from sdconvert.errors import UsageError
from sdconvert.quantize.adaround.code_grid import CodeGrid
from sdconvert.quantize.adaround.coordinate import Rounding
from sdconvert.quantize.adaround.layers import RoundedLayer
from sdconvert.quantize.adaround.moments import GramMoments, Moments
from sdconvert.quantize.adaround.soft import Schedule
from sdconvert.quantize.adaround.solve import LayerFigures, Measured, SolverSettings, Workspace, solve
from sdconvert.quantize.grid import WeightGrid

DAMPING = (0.03, 0.1, 0.3, 1.0, 3.0)
SETTINGS = {
    "coordinate": SolverSettings(damping=DAMPING),
    "adaround": SolverSettings("adaround", DAMPING, schedule=Schedule(iterations=200)),
    "refit": SolverSettings(damping=DAMPING, refit_scale=True),
}
ASYMMETRIC = [
    {"bitwidth": 8, "dtype": "int", "is_symmetric": "False", "offset": -100 - k, "scale": 0.02 + 0.001 * k}
    for k in range(6)
]


def grids(weight: Tensor) -> dict[str, CodeGrid]:
    per_tensor = [{"bitwidth": 4, "dtype": "int", "is_symmetric": "True", "offset": -8, "scale": 0.4}]
    return {
        "per channel": int4_grid(weight),
        "per tensor": CodeGrid.from_encodings(per_tensor, weight.shape),
        "blocks": int4_grid(weight, 2),
        "asymmetric": CodeGrid.from_encodings(ASYMMETRIC, weight.shape),
        "int8": CodeGrid.symmetric_blocks(weight.abs().amax(1, keepdim=True) / 128, 8),
    }


@pytest.fixture(scope="module")
def held_out() -> Data:
    return Data(LAYERS["linear"], samples=8, seed=7)


@pytest.mark.parametrize("grid_name", ["per channel", "per tensor", "blocks", "asymmetric", "int8"])
@pytest.mark.parametrize("method", ["coordinate", "adaround"])
def test_codes_are_neighbours_of_the_weight_and_better_than_nearest(method: str, grid_name: str) -> None:
    data, other = Data(LAYERS["linear"], samples=40), Data(LAYERS["linear"], samples=10, seed=7)
    weight = matrix(data)
    grid = grids(weight)[grid_name]
    other.weight = data.weight
    moments, judge = (GramMoments.of(layer_group(one), one.source) for one in (data, other))
    result = solve(Measured(moments), Measured(judge), channels_of(weight), grid, SETTINGS[method])
    low, high = grid.bounds(weight)
    assert ((result.codes == low) | (result.codes == high)).all()
    assert torch.equal(grid.weight_grid().quantize(grid.dequantize(result.codes).reshape(grid.scale.numel(), -1)),
                       grid.dequantize(result.codes).reshape(grid.scale.numel(), -1))  # fmt: skip
    figures = result.figures
    assert not figures.fell_back
    assert figures.changed > 0.02
    loss = other.loss(grid.dequantize(result.codes).reshape(data.weight.shape)).sum()
    nearest = other.loss(grid.dequantize(grid.nearest(weight)).reshape(data.weight.shape)).sum()
    assert figures.loss == pytest.approx(float(loss), rel=1e-2)
    assert figures.nearest_loss == pytest.approx(float(nearest), rel=1e-2)
    # Most of the loss of 8 bits is what the paths differ by, which rounding alone cannot undo.
    assert figures.loss < (0.999 if grid.bitwidth == 8 else 0.8) * figures.nearest_loss
    assert figures.sqnr_db > figures.nearest_sqnr_db


def test_next_to_the_best_of_all_roundings() -> None:
    """Seven columns have 128 roundings; the greedy order with descent comes close to the best, and is 1-optimal."""
    sums = torch.zeros(3)
    for seed in range(12):
        data = Data(RoundedLayer("small", (4, 7)), samples=4, seed=seed)
        weight = matrix(data)
        grid, channels = int4_grid(weight), channels_of(weight)
        moments = GramMoments.of(layer_group(data), data.source)
        low, high = grid.bounds(weight)

        def loss_of(codes: Tensor, moments: Moments = moments, grid: CodeGrid = grid, own: Tensor = weight) -> Tensor:
            return moments.loss(channels_of(own), grid.dequantize(codes) - own)

        every = [loss_of(torch.where(torch.tensor(up), high, low)) for up in itertools.product([False, True], repeat=7)]
        rounding = Rounding(moments, channels, grid, 0.0)
        codes = rounding.descend(rounding.sequential(7)[0], 20)
        loss = loss_of(codes)
        sums += torch.stack([torch.stack(every).amin(0).sum(), loss.sum(), loss_of(grid.nearest(weight)).sum()])
        for column in range(7):
            flipped = codes.clone()
            flipped[:, column] = low[:, column] + high[:, column] - codes[:, column]
            assert (loss_of(flipped) >= loss * (1 - 1e-3) - 1e-3).all()
    best, found, nearest = sums.tolist()
    assert best * (1 - 1e-4) <= found < best + 0.25 * (nearest - best)


@pytest.mark.parametrize("mode", MODES)
def test_modes_and_parts_agree(tmp_path: Path, mode: str) -> None:
    data = Data(LAYERS["3x3"], samples=40)
    weight = matrix(data)
    found = Measured(GramMoments.of(layer_group(data), data.source))
    reference = solve(found, None, channels_of(weight), int4_grid(weight), SETTINGS["coordinate"])
    moments = make_moments(mode, data, tmp_path)
    for workspace in (Workspace(), Workspace(channels=4, block=64)):
        result = solve(
            Measured(moments), None, channels_of(weight), int4_grid(weight), SETTINGS["coordinate"], workspace
        )
        loss = data.loss(result.grid.dequantize(result.codes).reshape(data.weight.shape)).sum()
        assert 10 * abs(torch.log10(loss / reference.figures.loss)) < 0.1


def test_parts_alone_change_nothing(held_out: Data) -> None:
    weight = matrix(held_out)
    moments = GramMoments.of(layer_group(held_out), held_out.source)
    results = [
        solve(
            Measured(moments),
            None,
            channels_of(weight),
            int4_grid(weight),
            SETTINGS["coordinate"],
            Workspace(channels=count),
        )
        for count in (6, 4)
    ]
    assert torch.equal(results[0].codes, results[1].codes)


def test_overfitting_is_caught_on_held_out_data() -> None:
    """One row of data of another kind than what comes later: nearest is better there, and is what is returned."""
    layer = RoundedLayer("linear", (6, 70))
    data, other = Data(layer, samples=1), Data(layer, samples=10, seed=1)
    data.quantized, data.floating = data.quantized[:, :1, :1], 3 * data.floating[:, :1, :1]
    other.weight = data.weight
    weight = matrix(data)
    moments, judge = (GramMoments.of(layer_group(one), one.source) for one in (data, other))
    solver = SolverSettings(damping=(1e-6,))
    result = solve(Measured(moments), Measured(judge), channels_of(weight), int4_grid(weight), solver)
    assert result.figures.fell_back
    assert torch.equal(result.codes, int4_grid(weight).nearest(weight).to(torch.int16))
    assert result.figures.loss == result.figures.nearest_loss
    assert solve(Measured(moments), None, channels_of(weight), int4_grid(weight), solver).figures.changed > 0.2


@pytest.mark.parametrize("samples", [2, 6, 40, 300])
def test_the_damping_is_next_to_the_best_of_all_on_held_out_data(samples: int) -> None:
    """Few samples ask for more of it; with one sweep and one part of the layer, the trial is what is returned."""
    layer = RoundedLayer("linear", (12, 70))
    data, other = Data(layer, samples=samples), Data(layer, samples=20, seed=1)
    data.quantized, data.floating = data.quantized[:, :1], data.floating[:, :1]  # one row of each
    other.weight = data.weight
    weight = matrix(data)
    moments, judge = (Measured(GramMoments.of(layer_group(one), one.source)) for one in (data, other))

    def figures(*damping: float) -> LayerFigures:
        settings = SolverSettings(damping=damping, sweeps=1)
        return solve(moments, judge, channels_of(weight), int4_grid(weight), settings).figures

    losses = [figures(damping).loss for damping in DAMPING]
    # Where the loss falls and rises more than once, the search may stop early.
    assert figures(*DAMPING).loss < min(losses) + 0.2 * (losses[len(losses) // 2] - min(losses)) + 0.02 * min(losses)


def test_refitted_scales_are_better_and_their_own_grid() -> None:
    data = Data(LAYERS["linear"], samples=40)
    weight, moments = matrix(data), GramMoments.of(layer_group(data), data.source)
    kept, refitted = (
        solve(Measured(moments), None, channels_of(weight), int4_grid(weight), SETTINGS[name])
        for name in ("coordinate", "refit")
    )
    assert refitted.figures.loss < kept.figures.loss
    assert not torch.equal(refitted.grid.scale, kept.grid.scale)
    loss = data.loss(refitted.grid.dequantize(refitted.codes)).sum()
    assert refitted.figures.loss == pytest.approx(float(loss), rel=1e-3)
    with pytest.raises(UsageError, match="per tensor"):
        solve(Measured(moments), None, channels_of(weight), grids(weight)["per tensor"], SETTINGS["refit"])


def test_dead_inputs_keep_the_nearest_codes() -> None:
    data = Data(LAYERS["linear"], samples=4, difference=0.0)
    data.quantized[..., :10] = data.floating[..., :10] = 0
    weight = matrix(data)
    found = Measured(GramMoments.of(layer_group(data), data.source))
    result = solve(found, None, channels_of(weight), int4_grid(weight), SETTINGS["coordinate"])
    assert torch.equal(result.codes[:, :10], int4_grid(weight).nearest(weight)[:, :10].to(torch.int16))


def test_nearest_and_encodings_are_those_of_the_file(held_out: Data) -> None:
    weight = matrix(held_out)
    for name, grid in grids(weight).items():
        entries = grid.encodings()
        assert len(entries) == {"per tensor": 1, "blocks": 12}.get(name, 6)
        again = CodeGrid.from_encodings(entries, weight.shape)
        assert again.encodings() == entries
        own = WeightGrid.from_encodings(entries, weight.shape).quantize(weight)
        assert torch.equal(grid.dequantize(grid.nearest(weight)), own)
