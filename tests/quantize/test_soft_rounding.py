"""H18: soft rounding begins at the weight itself, is trained, and ends on the grid."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdconvert.errors import PluginError
from sdconvert.plugins import require_fused
from sdconvert.quantize.grid import WeightGrid
from sdconvert.quantize.soft_rounding import GAMMA, ZETA, SoftRoundingBlock

LAYERS = {
    "linear": (lambda: nn.Linear(12, 6), (40, 12)),
    "conv": (lambda: nn.Conv2d(3, 6, 3, padding=1), (8, 3, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (8, 4, 5, 5)),
}


def grid_of(weight: Tensor, *, per_channel: bool = True, bitwidth: int = 4) -> WeightGrid:
    rows = weight.detach().flatten(1).abs().amax(1) if per_channel else weight.detach().abs().max()[None]
    half = 2 ** (bitwidth - 1)
    # A little too short a range, so that some values are cut off.
    entries = [
        {"bitwidth": bitwidth, "dtype": "int", "is_symmetric": "True", "offset": -half, "scale": float(top) / half}
        for top in rows
    ]
    return WeightGrid.from_encodings(entries, weight.shape)


def train(layer: nn.Module, block: SoftRoundingBlock, x: Tensor, target: Tensor, steps: int = 300) -> None:
    """AdaRound of one layer: full batch, beta annealed from 20 to 2 after a fifth of the steps."""
    optimizer = torch.optim.Adam([block.alpha], lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), target, reduction="sum") / len(x)
        if step >= steps // 5:
            loss = loss + 0.01 * block.regularizer(20 - 18 * step / steps)
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_h18_fused_weights_lie_on_the_grid(kind: str, per_channel: bool) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make()
    mixing = torch.randn(shape[1], shape[1])
    x = torch.einsum("bc...,cd->bd...", torch.randn(shape), mixing)
    before, target = copy.deepcopy(layer.state_dict()), layer(x).detach()
    grid = grid_of(layer.weight, per_channel=per_channel)
    nearest = copy.deepcopy(layer)
    nearest.weight.data = grid.quantize(layer.weight.detach())
    block = SoftRoundingBlock("adaround", layer, grid)
    with pytest.raises(PluginError, match=r"fuse\(\)"):
        require_fused(layer)
    train(layer, block, x, target)
    assert all(torch.equal(layer.state_dict()[key], before[key]) for key in before)
    block.fuse()
    require_fused(layer)
    steps = grid.to_steps(layer.weight.detach()).double()
    assert (steps - steps.round()).abs().max() < 1e-4
    assert steps.round().min() >= -8
    assert steps.round().max() <= 7
    assert torch.equal(grid.quantize(layer.weight.detach()), layer.weight)
    # Each value went to one of its own two neighbours, or to the end of the grid.
    assert torch.all((steps.round() - grid.to_steps(before["weight"]).clamp(-8, 7)).abs() < 1 + 1e-4)
    assert list(layer.state_dict()) == list(before)
    assert torch.equal(layer.bias, before["bias"])
    assert F.mse_loss(layer(x), target) < 0.9 * F.mse_loss(nearest(x), target)


def test_the_layer_begins_with_its_own_weight_and_rounds_to_nearest() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 6)
    grid, weight = grid_of(layer.weight), layer.weight.detach().clone()
    block = SoftRoundingBlock("adaround", layer, grid)
    inside = grid.from_steps(grid.to_steps(weight))
    torch.testing.assert_close(block(weight), inside, rtol=0, atol=1e-6)
    block.hard = True
    assert torch.equal(block(weight), grid.quantize(weight))


def test_rounding_is_the_paper_s() -> None:
    """Eq. 23 and 24 written out for a few values, the cut-off ends among them."""
    layer = nn.Linear(5, 1)
    block = SoftRoundingBlock("adaround", layer, grid_of(layer.weight))
    block.alpha.data = torch.tensor([[-9.0, -1.0, 0.0, 1.0, 9.0]])
    h = (1 / (1 + (-block.alpha).exp()) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
    torch.testing.assert_close(block.rounding(), h)
    assert block.rounding()[0, [0, 2, 4]].tolist() == pytest.approx([0, 0.5, 1])
    expected = sum(1 - abs(2 * value - 1) ** 3 for value in h[0].tolist())
    assert block.regularizer(3).item() == pytest.approx(expected, rel=1e-5)
    block.regularizer(3).backward()
    assert block.alpha.grad is not None
    assert block.alpha.grad[0, [0, 4]].tolist() == [0, 0]


def test_only_alpha_is_trained() -> None:
    layer = nn.Linear(12, 6)
    block = SoftRoundingBlock("adaround", layer, grid_of(layer.weight))
    layer(torch.randn(3, 12)).sum().backward()
    assert [name for name, _ in block.named_parameters()] == ["alpha"]
    assert block.alpha.grad is not None
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
