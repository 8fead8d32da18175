"""AdaRound of every family's graph, plugins, skips and masks included: closer to fp32 on inputs that were not seen."""

from pathlib import Path

import pytest
import torch
from model_families import FAMILIES, shared_family

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.config import AdaRoundSection
from sdconvert.metrics import worst_sqnr_db
from sdconvert.quantize.rounding import round_weights, rounded_grids
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Simulation

# Convolutions and linear layers; the slow test has all.
QUICK = ("vae_encoder", "clip")


def varied(adapter: ModelAdapter, call: Tensors, count: int) -> list[Tensors]:
    """Inputs like a recorded one; integers, which are tokens, in another order."""
    generator = torch.Generator().manual_seed(3)

    def one(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].reshape(tensor.shape)
        return tensor + 0.5 * tensor.std(correction=0) * torch.randn(tensor.shape, generator=generator)

    return [{name: one(tensor) for name, tensor in call.items()} for _ in range(count)]


def gain_db(name: str, folder: Path) -> tuple[float, int]:
    """What AdaRound gains at the worst output on unseen inputs, at 4 bits; and how many layers it rounded."""
    family = shared_family(name)
    samples = varied(family.adapter, family.adapter.pack(family.call), 20)
    simulation = Simulation(
        family.adapter, samples[0], load_settings({75}).with_bitwidths(weight=4, activation=16, per_channel=True)
    )
    simulation.calibrate(samples[:16])

    def level() -> float:
        seen = [worst_sqnr_db(family.adapter.run(sample), simulation(sample)) for sample in samples[16:]]
        return sum(seen) / len(seen)

    nearest = level()
    result = round_weights(simulation, samples[:16], AdaRoundSection(), folder, lambda *_: None)
    assert result.figures.keys() == rounded_grids(simulation).keys()
    assert all(figures.loss <= figures.nearest_loss for figures in result.figures.values())
    return level() - nearest, len(result.figures)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_every_family_gains(name: str, tmp_path: Path) -> None:
    gain, layers = gain_db(name, tmp_path)
    assert layers >= 8
    assert gain > 1
