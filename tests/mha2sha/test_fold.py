"""The scale of attention inside its queries: the same function, the same grids times the scale, one `mul` less."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mha_folder import write_folder
from static_graphs import SMALL_UNET, Case, simulate, small_case, small_controlnet_case

from sdconvert.errors import UsageError
from sdconvert.metrics import max_abs, worst_sqnr_db
from sdconvert.mha2sha.artifact import Mha2ShaArtifact
from sdconvert.mha2sha.command import convert_folder
from sdconvert.mha2sha.fold import fold_scales, fold_sections
from sdconvert.quantize.files import from_sections, to_sections
from sdconvert.quantize.simulation import Simulation


def pixel_case() -> Case:
    """A UNet with attention to pixels besides, whose heads are of dimension 2."""
    return small_case(SMALL_UNET | {"attention_head_dim": 4})


# Heads of dimension 4, whose scale is a power of two, and 8.
@pytest.mark.parametrize("make", [small_controlnet_case, pytest.param(pixel_case, marks=pytest.mark.slow)])
def test_folding_keeps_the_function(tmp_path: Path, make: Callable[[], Case]) -> None:
    case = make()
    graph, one = case.adapter.graph_name, case.samples[0]
    mha = simulate(case)
    write_folder(tmp_path / "mha", case, mha)
    convert_folder(tmp_path / "mha", tmp_path / "out" / graph)
    sha = Mha2ShaArtifact(tmp_path / "out").simulation(graph, case.adapter, one, mha.settings)
    sections, fp32, quantized = to_sections(sha), case.adapter.run(one), sha(one)
    before = {key: tensor.clone() for key, tensor in case.adapter.model.state_dict().items()}
    factors = fold_scales(case.adapter.model)
    after = case.adapter.model.state_dict()
    assert all(torch.equal(after[key], before[key] * factors.get(key, 1.0)) for key in before)
    assert all(".to_q_convs." in key for key in factors)
    for name, answer in case.adapter.run(one).items():
        assert max_abs(fp32[name], answer) <= 1e-5 * float(fp32[name].abs().max())
    folded = Simulation(case.adapter, one, mha.settings)
    assert not any(":mul." in key and ".attn" in key for key in folded.quantizers.activations)
    folded.load(from_sections(fold_sections(sections, factors), folded))
    assert worst_sqnr_db(quantized, folded(one)) >= 50
    with pytest.raises(UsageError, match="fold_scale has no effect"):
        fold_scales(case.adapter.model)
