"""Weights on their grid in plain torch equal AIMET's simulation bit for bit, and leave a model as it was."""

import copy
from typing import Any

import pytest
import torch
from aimet_torch.quantization.affine import QuantizeDequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from static_graphs import shared_case, shared_simulation
from torch import Tensor, nn

from sdconvert.errors import EncodingsError
from sdconvert.metrics import worst_sqnr_db
from sdconvert.quantize import aimet
from sdconvert.quantize.grid import FakeQuantBlock, WeightGrid, fake_quantized


def aimet_quantizer(weight: Tensor, bitwidth: int, symmetric: bool, scales: str) -> QuantizeDequantize:
    shape = () if scales == "tensor" else (weight.shape[0], *[1] * (weight.dim() - 1))
    block_size = None
    if scales == "block":
        shape = (weight.shape[0], weight.shape[1] // 2, *shape[2:])
        block_size = (1, 2, *weight.shape[2:])
    quantizer = QuantizeDequantize(shape=shape, bitwidth=bitwidth, symmetric=symmetric, block_size=block_size)
    with quantizer.compute_encodings():
        quantizer(weight)
    return quantizer


grids = st.sampled_from([(bits, True, scales) for bits in (4, 8, 16) for scales in ("channel", "tensor")])
grids |= st.sampled_from([(bits, False, "tensor") for bits in (4, 8, 16)])
cases = st.tuples(grids, st.sampled_from([(6, 5), (4, 3, 3, 3), (7,)]))
cases |= st.tuples(st.sampled_from([(4, True, "block"), (8, True, "block")]), st.sampled_from([(6, 4), (4, 8, 3, 3)]))


@given(cases, st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_a_weight_is_rounded_as_in_the_simulation(
    case: tuple[tuple[int, bool, str], tuple[int, ...]], seed: int
) -> None:
    grid, shape = case
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    quantizer = aimet_quantizer(weight, *grid)
    # As a file's reader does: the grid of the encodings, for values on its ties and beyond its ends too.
    ours = WeightGrid.from_encodings(quantizer.get_legacy_encodings(), shape)
    aimet.write({"w": quantizer}, {"w": quantizer.get_legacy_encodings()})
    step = quantizer.get_scale().detach()
    if grid[2] == "block":
        step = step.repeat_interleave(2, 1)
    with torch.no_grad():  # with gradients AIMET divides by the scale, where the simulation multiplies
        for values in (weight, 2 * weight, ((weight / step).round() + 0.5) * step):
            assert torch.equal(ours.quantize(values), quantizer(values).as_subclass(Tensor))
    nearest = ours.from_steps(ours.to_steps(weight).round())
    torch.testing.assert_close(nearest, ours.quantize(weight), rtol=0, atol=float(step.max()) * 1.01)


def test_the_gradient_passes_inside_the_range_and_stops_outside() -> None:
    entry = {"bitwidth": 4, "dtype": "int", "is_symmetric": "True", "offset": -8, "scale": 0.5}
    grid = WeightGrid.from_encodings([entry], (1, 4))
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[0.6, -1.1, 9.0, -9.0]])
    block = FakeQuantBlock("fake_quant", layer, grid)
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert torch.equal(layer(x), torch.tensor([[0.5 - 2.0 + 3 * 3.5 - 4 * 4.0]]))
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, torch.tensor([[1.0, 2.0, 0.0, 0.0]]))
    block.fuse()
    assert torch.equal(layer.weight, torch.tensor([[0.5, -1.0, 3.5, -4.0]]))


@pytest.mark.parametrize("name", ["small_controlnet", pytest.param("unet", marks=pytest.mark.slow)])
def test_a_model_with_fake_quantized_weights_is_its_simulation_with_floating_activations(name: str) -> None:
    case, simulation = shared_case(name), shared_simulation(name)
    model = case.adapter.model
    before = copy.deepcopy(model.state_dict())
    floating = aimet.without_quantizers(simulation.graph_module, simulation.quantizers.activations)
    fp32 = case.adapter.run(case.samples[0])
    with fake_quantized(model, simulation.encodings().parameters) as group:
        ours = case.adapter.run(case.samples[0])
        assert group.keys() == simulation.encodings().parameters.keys()
    with torch.no_grad():
        theirs = dict(zip(ours, floating(*case.samples[0].values()), strict=True))
    # The two differ by how sums are ordered in traced attention, not by what is summed.
    assert worst_sqnr_db({k: v.as_subclass(Tensor) for k, v in theirs.items()}, ours) > 100
    assert 25 < worst_sqnr_db(fp32, ours) < 60
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    again = case.adapter.run(case.samples[0])
    assert all(torch.equal(again[key], fp32[key]) for key in fp32)


def entry(**changes: Any) -> dict[str, Any]:
    return {"bitwidth": 8, "dtype": "int", "is_symmetric": "True", "offset": -128, "scale": 0.1} | changes


@pytest.mark.parametrize(
    ("encodings", "message"),
    [
        ({"0.wait": [entry()]}, "1 encodings are for no parameter of Sequential, the first `0.wait`\n.*`0.weight`"),
        ({"0.weight": [entry()] * 3}, r"3 encodings for a weight of shape \(4, 2\)\n.*1, 4, or as many"),
        ({"0.weight": [entry(dtype="float")]}, "no one integer grid"),
        ({"0.weight": [entry(), entry(), entry(bitwidth=4), entry()]}, "no one integer grid"),
    ],
)
def test_encodings_that_do_not_fit_are_refused_before_anything_is_attached(encodings: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(2, 4))
    with pytest.raises(EncodingsError, match=message), fake_quantized(model, encodings):
        pass
    assert [name for name, _ in model.named_modules()] == ["", "0"]
