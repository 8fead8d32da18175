"""Bits and blocks that a recipe gives MHA layers reach every part that SHA makes of them."""

from pathlib import Path

import pytest
import torch
from mha_folder import write_folder
from static_graphs import small_controlnet_case

from sdconvert.config import LayerPrecision
from sdconvert.metrics import worst_sqnr_db
from sdconvert.mha2sha.artifact import Mha2ShaArtifact
from sdconvert.mha2sha.command import convert_folder, reverse_folder
from sdconvert.models.rewrite_names import REWRITES
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Simulation

LAYERS = {
    "*.attn1.to_q": LayerPrecision(weight_bitwidth=4),
    "*.attn1.to_v": LayerPrecision(weight_bitwidth=4, block_size=8),
    "*.ff.net.*": LayerPrecision(weight_bitwidth=4, block_size=8),
    "*.attn1.to_out.0": LayerPrecision(weight_bitwidth=16),
}


@pytest.mark.parametrize("rewrites", [pytest.param((), marks=pytest.mark.slow), REWRITES], ids=["heads", "rewrites"])
def test_the_sha_form_has_the_bits_of_its_mha_form(tmp_path: Path, rewrites: tuple[str, ...]) -> None:
    case = small_controlnet_case()
    settings = load_settings({75})
    mha = Simulation(case.adapter, case.samples[0], settings.model_copy(update={"layers": LAYERS}))
    mha.calibrate(case.samples)
    before = mha(case.samples[0])
    write_folder(tmp_path / "mha", case, mha)
    convert_folder(tmp_path / "mha", tmp_path / "out" / "controlnet", rewrites=rewrites)
    sha = Mha2ShaArtifact(tmp_path / "out").simulation("controlnet", case.adapter, case.samples[0], settings)
    parameters = sha.encodings().parameters
    bits = {name: entries[0]["bitwidth"] for name, entries in parameters.items()}
    kinds = ("to_q", "to_k", "to_v", "to_out")
    of = {kind: {width for name, width in bits.items() if f".attn1.{kind}" in name} for kind in kinds}
    assert of == {"to_q": {4}, "to_k": {8}, "to_v": {4}, "to_out": {16}}
    state = case.adapter.model.state_dict()
    for name, entries in parameters.items():
        blocked = 8 * (".attn1.to_v" in name or ".ff.net." in name)
        if blocked:
            assert len(entries) == state[name].shape[0] * state[name].shape[1] // blocked, name
    assert worst_sqnr_db(before, sha(case.samples[0])) > 45
    reverse_folder(tmp_path / "out" / "controlnet", tmp_path / "back")
    for name in ("parameters_mha.encodings", "controlnet.encodings"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "mha" / name).read_bytes()
    fp32 = case.adapter.run(case.samples[0])
    assert not any(torch.equal(before[name], fp32[name]) for name in fp32)
