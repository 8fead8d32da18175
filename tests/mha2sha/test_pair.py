"""UNet and ControlNet as one module: bit-equal to the two graphs in turn, in either form of attention."""

from pathlib import Path
from typing import Any

import pytest
import torch
from static_graphs import GOLDEN

from sdconvert.adapters import adapter_for
from sdconvert.adapters.controlnet import ControlNetModelAdapter
from sdconvert.errors import QualityGateError
from sdconvert.io.tensors import load_tensors
from sdconvert.mha2sha.pair import run_pair
from sdconvert.mha2sha.proof import require_small
from sdconvert.models.attention import SHAAttentionPatch
from sdconvert.models.pasd import load_pasd

SCALE = 0.8


def open_pair(folder: Path) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    unet, controlnet = load_pasd(folder)
    recorded = load_tensors(folder / "io.safetensors")
    names = ("sample", "timestep", "encoder_hidden_states", "controlnet_cond")
    adapter = ControlNetModelAdapter(controlnet, SCALE)
    return adapter_for(unet), adapter, adapter.pack({name: recorded[name] for name in names})


@pytest.mark.parametrize("variant", ["pasd", "pasd_light"])
def test_h17_the_pair_keeps_its_answer_when_both_are_rewritten(variant: str) -> None:
    unet, controlnet, inputs = open_pair(GOLDEN / variant)
    modules = [name for name, _ in unet.model.named_modules()]
    mha = run_pair(unet, controlnet, SCALE, inputs)
    *down, mid = controlnet.run(inputs).values()
    handed = {f"down_block_additional_residuals_{k}": tensor for k, tensor in enumerate(down)}
    handed["mid_block_additional_residual"] = mid
    shared = {name: tensor for name, tensor in inputs.items() if name != "controlnet_cond"}
    assert torch.equal(mha, unet.run(shared | handed)["out_sample"])
    assert [name for name, _ in unet.model.named_modules()] == modules
    patches = [SHAAttentionPatch.wrap_model("sha", adapter.model) for adapter in (unet, controlnet)]
    for group in patches:
        group.fuse()
    sha = run_pair(unet, controlnet, SCALE, inputs)
    error = float((sha - mha).abs().max() / mha.abs().max())
    assert error <= 1e-5
    # A wrong head of the ControlNet shows in the UNet's answer, whose own weights are right.
    attention = next(m for name, m in controlnet.model.named_modules() if name.endswith("mid_block.attentions.0"))
    attention.transformer_blocks[0].attn1.to_v_convs[0].weight.data *= 1.5
    wrong = float((run_pair(unet, controlnet, SCALE, inputs) - mha).abs().max() / mha.abs().max())
    assert wrong > 1e-5
    with pytest.raises(QualityGateError, match="the pair: SHA differs from MHA by"):
        require_small("the pair", {"right": error, "wrong": wrong})
    with pytest.raises(QualityGateError, match="nan"):
        require_small("the pair", {"right": error, "broken": float("nan")})
