"""The scale of attention inside its queries: the same function, the same grids times the scale, one `mul` less."""

from pathlib import Path

import pytest
import torch
from mha_folder import write_folder
from static_graphs import SMALL_UNET, simulate, small_case

from sdconvert.errors import UsageError
from sdconvert.metrics import max_abs, worst_sqnr_db
from sdconvert.mha2sha.artifact import Mha2ShaArtifact
from sdconvert.mha2sha.command import convert_folder
from sdconvert.mha2sha.fold import fold_scales, fold_sections
from sdconvert.quantize.files import from_sections, to_sections
from sdconvert.quantize.simulation import Simulation


# Of dimension 4, whose scale is a power of two, and of dimension 2.
@pytest.mark.parametrize("heads", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_folding_keeps_the_function(tmp_path: Path, heads: int) -> None:
    case = small_case(SMALL_UNET | {"attention_head_dim": heads})
    one = case.samples[0]
    mha = simulate(case)
    write_folder(tmp_path / "mha", case, mha)
    convert_folder(tmp_path / "mha", tmp_path / "out" / "unet")
    sha = Mha2ShaArtifact(tmp_path / "out").simulation("unet", case.adapter, one, mha.settings)
    sections, fp32, quantized = to_sections(sha), case.adapter.run(one), sha(one)
    before = {key: tensor.clone() for key, tensor in case.adapter.model.state_dict().items()}
    factors = fold_scales(case.adapter.model)
    after = case.adapter.model.state_dict()
    assert all(torch.equal(after[key], before[key] * factors.get(key, 1.0)) for key in before)
    assert all(".to_q_convs." in key for key in factors)
    error = max_abs(fp32["out_sample"], case.adapter.run(one)["out_sample"])
    assert error <= 1e-5 * float(fp32["out_sample"].abs().max())
    folded = Simulation(case.adapter, one, mha.settings)
    assert not any(":mul." in key and ".attn" in key for key in folded.quantizers.activations)
    folded.load(from_sections(fold_sections(sections, factors), folded))
    assert worst_sqnr_db(quantized, folded(one)) >= 50
    with pytest.raises(UsageError, match="fold_scale has no effect"):
        fold_scales(case.adapter.model)
