"""Blocks are what a reader of the model would call so: modules with one output, or layers and their activations."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adaround_graphs import block_graph, rounded_weights
from static_graphs import Case, module_case, shared_trace, vae_case
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdconvert.adapters import adapter_for
from sdconvert.errors import UsageError
from sdconvert.quantize import graph
from sdconvert.quantize.adaround.blocks import Block, Kind, find_blocks
from sdconvert.quantize.adaround.steps import SegmentedGraph

CLIP: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 96,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "vocab_size": 100,
    "bos_token_id": 98,
    "eos_token_id": 99,
    "pad_token_id": 1,
}


def segmented(case: Case | str) -> SegmentedGraph:
    """A case's, or a shared one's by its name."""
    traced = shared_trace(case) if isinstance(case, str) else graph.trace(case.adapter, case.samples[0])
    return SegmentedGraph(traced, rounded_weights(traced))


def by_name(blocks: tuple[Block, ...]) -> dict[str, list[str]]:
    return {block.name: [layer.name.removesuffix(".weight") for layer in block.layers] for block in blocks}


def require_sound(graph_: SegmentedGraph, blocks: tuple[Block, ...]) -> None:
    """Inputs wait when a block begins, and no layer is in two blocks."""
    made = set(graph_.inputs)
    starts = {block.first: block for block in blocks}
    for index, segment in enumerate(graph_.segments):
        made |= {step.output for step in segment}
        if index in starts:
            assert made >= set(starts[index].inputs)
            assert starts[index].outputs
    names = [layer.name for block in blocks for layer in block.layers]
    assert len(names) == len(set(names))


def test_resnets_and_transformers_of_pasd_s_unet_are_blocks() -> None:
    case = segmented("unet")
    blocks = find_blocks(case, "block")
    require_sound(case, blocks)
    found = by_name(blocks)
    assert found["down_blocks.0.resnets.0"] == [
        f"down_blocks.0.resnets.0.{name}" for name in ("conv1", "time_emb_proj", "conv2")
    ]
    assert found["time_embedding"] == ["time_embedding.linear_1", "time_embedding.linear_2"]
    pixel = found["up_blocks.1.pixel_attentions.1"]
    assert len(pixel) == 12, "PASD's pixel attention is a block of its own"
    text = found["mid_block.attentions.0"]
    assert "mid_block.attentions.0.transformer_blocks.0.attn2.to_k" in text, (
        "solved with the first block's, for one input"
    )
    assert all(len(block.outputs) == 1 for block in blocks)


def test_blocks_of_a_controlnet() -> None:
    case = segmented("small_controlnet")
    blocks = find_blocks(case, "block")
    require_sound(case, blocks)
    assert "controlnet_cond_embedding" in by_name(blocks)
    assert any(name.startswith("down_blocks.0.resnets.0") for name in by_name(blocks))


def test_blocks_of_a_vae_and_a_text_encoder() -> None:
    vae = segmented(vae_case())
    require_sound(vae, find_blocks(vae, "block"))
    assert "decoder.mid_block" in by_name(find_blocks(vae, "block"))
    torch.manual_seed(0)
    adapter = adapter_for(CLIPTextModel(CLIPTextConfig(**CLIP)).eval())
    traced = graph.trace(adapter, adapter.pack({"input_ids": torch.randint(0, 90, (1, 77))}))
    text = SegmentedGraph(traced, rounded_weights(traced))
    blocks = find_blocks(text, "block", largest=6)
    require_sound(text, blocks)
    assert [len(block.layers) for block in blocks] == [6, 6, 6], "attention and MLP of each of three layers"
    gated = find_blocks(text, "layer+activation")
    require_sound(text, gated)
    assert [name.rpartition("mlp.")[2] for name in by_name(gated)] == ["fc1.weight"] * 3, (
        "QuickGELU is x * sigmoid(1.7 x)"
    )


def test_activations_as_functions_and_modules_belong_to_their_layers() -> None:
    traced = block_graph()
    case = SegmentedGraph(traced, rounded_weights(traced))
    blocks = find_blocks(case, "layer+activation")
    require_sound(case, blocks)
    assert by_name(blocks) == {"conv_in.weight": ["conv_in"], "grouped.weight": ["grouped"], "proj.weight": ["proj"]}
    gated = [step.output.name for step in blocks[-1].steps]
    assert [name.partition("_")[0] for name in gated] == ["linear", "chunk", "getitem", "getitem", "gelu", "mul"]
    module = segmented(module_case(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), 2, 4))
    assert by_name(find_blocks(module, "layer+activation")) == {"0.weight": ["0"]}


class Twice(nn.Module):
    """A layer that runs in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), self.shared, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.shared(self.block(x)))


def test_a_layer_that_runs_elsewhere_too_stays_as_moments_have_it() -> None:
    (block,) = find_blocks(segmented(module_case(Twice(), 2, 4)), "block", paths=["block"])
    assert [layer.name for layer in block.layers] == ["block.0.weight", "block.2.weight"]


@pytest.mark.parametrize(
    ("kind", "paths", "message"),
    [
        ("block", ["down_blocks.0.resnets.7"], "`down_blocks.0.resnets.7` is no module"),
        ("block", ["conv_in"], "`conv_in` is no module of the graph with two"),
        ("block", ["mid_block", "mid_block.resnets.0"], "`mid_block` and `mid_block.resnets.0` overlap"),
        ("layer+activation", ["mid_block"], "takes no paths"),
    ],
)
def test_what_is_no_block_is_refused(kind: Kind, paths: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_blocks(segmented("unet"), kind, paths=paths)


def test_a_graph_without_blocks_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to reconstruct"):
        find_blocks(segmented(module_case(nn.Sequential(nn.Linear(4, 4)), 2, 4)), "block")
