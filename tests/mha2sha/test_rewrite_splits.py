"""The rename map of the rewrites beside attention: from names and shapes, for weights, ranges and the way back."""

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from static_graphs import Case, module_case, shared_case, simulate
from torch import Tensor, nn

from sdconvert.errors import CheckpointError
from sdconvert.io.encodings import read_encodings_file, write_encodings
from sdconvert.io.tensors import save_tensors
from sdconvert.metrics import worst_sqnr_db
from sdconvert.mha2sha.encodings import merge_encodings, split_encodings, verify_parameter_encodings
from sdconvert.mha2sha.forms import rewrite_to_sha
from sdconvert.mha2sha.heads import head_splits
from sdconvert.mha2sha.name_map import NameMap
from sdconvert.mha2sha.rewrites import rewrite_splits
from sdconvert.mha2sha.row_split import RowSplit
from sdconvert.mha2sha.state_dict import split_state_dict
from sdconvert.models.attention import SHAAttentionPatch
from sdconvert.models.rewrite_names import REWRITES
from sdconvert.models.rewrites import apply_rewrites
from sdconvert.quantize.artifact import load_simulation
from sdconvert.quantize.files import to_sections

sizes = st.integers(1, 9)
BLOCK = "mid_block.attentions.0.transformer_blocks.0"


def transformer(channels: int, inner: int, *, gated: bool, bias: bool, linear: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of a transformer over images, and of layers of the same names outside of one."""
    pixels = () if linear else (1, 1)
    weights: dict[str, tuple[int, ...]] = {
        "mid_block.attentions.0.proj_in": (channels, channels, *pixels),
        f"{BLOCK}.attn1.to_out.0": (channels, channels),
        f"{BLOCK}.ff.net.0.proj": ((2 if gated else 1) * inner, channels),
        f"{BLOCK}.ff.net.2": (channels, inner),
        "mid_block.attentions.0.proj_out": (channels, channels, *pixels),
        "transformer_blocks.0.ff.net.2": (channels, inner),
        "time_embedding.linear_1": (channels, channels),
    }
    shapes = {f"{path}.weight": shape for path, shape in weights.items()}
    shapes |= {f"{path}.bias": shape[:1] for path, shape in weights.items() if bias}
    norms = ("mid_block.attentions.0.norm", f"{BLOCK}.norm1")
    return shapes | {f"{path}.{kind}": (channels,) for path in norms for kind in ("weight", "bias")}


@settings(deadline=None)
@given(sizes, sizes, st.booleans(), st.booleans(), st.booleans(), st.sets(st.sampled_from(REWRITES[:2])))
def test_every_projection_is_split_as_its_name_and_shape_say(
    channels: int, inner: int, gated: bool, bias: bool, linear: bool, rewrites: set[str]
) -> None:
    shapes = transformer(channels, inner, gated=gated, bias=bias, linear=linear)
    splits = {split.parent: split for split in rewrite_splits(shapes, rewrites)}
    convolutions, halves = "linear_to_conv2d" in rewrites, gated and "gated_conv2d" in rewrites
    entry = f"{BLOCK}.ff.net.0.proj"
    whole = [f"{BLOCK}.attn1.to_out.0", f"{BLOCK}.ff.net.2"]
    whole += ["mid_block.attentions.0.proj_in", "mid_block.attentions.0.proj_out"] if linear else []
    whole += [] if gated else [entry]
    expected = {f"{path}.weight" for path in whole} if convolutions else set()
    expected |= {f"{entry}.{kind}" for kind in (("weight", "bias") if bias else ("weight",))} if halves else set()
    assert splits.keys() == expected
    for parent, split in splits.items():
        kind = parent.rpartition(".")[2]
        assert split.rows == shapes[parent][0]
        assert split.to_convolution == (kind == "weight")
        names = [f"{entry}_convs.{half}.{kind}" for half in (0, 1)] if parent.startswith(entry) and halves else [parent]
        assert [part.name for part in split] == names


def test_half_a_file_is_refused_or_left_alone() -> None:
    shapes = transformer(4, 6, gated=True, bias=True, linear=False)
    with pytest.raises(CheckpointError, match="has 13 rows, which are no two halves"):
        rewrite_splits(shapes | {f"{BLOCK}.ff.net.0.proj.bias": (13,)}, REWRITES)
    for missing in (f"{BLOCK}.ff.net.0.proj.weight", f"{BLOCK}.ff.net.2.weight"):
        rest = {key: shape for key, shape in shapes.items() if key != missing}
        assert not any("proj_convs" in part.name for split in rewrite_splits(rest, REWRITES) for part in split)


class OneTransformer(nn.Module):
    """A transformer over an image of four channels, whose text is the image again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transformer = Transformer2DModel(2, 4, in_channels=4, norm_num_groups=2, cross_attention_dim=4)
        for parameter in self.transformer.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.transformer(x, encoder_hidden_states=x.reshape(1, -1, 4), return_dict=False)[0]
        return output


def splits_of(case: Case, rewrites: Sequence[str] = REWRITES) -> list[RowSplit]:
    shapes = {key: tuple(tensor.shape) for key, tensor in case.adapter.model.state_dict().items()}
    heads = {layer.path: layer.heads for layer in case.adapter.attention_layers()}
    return head_splits(shapes, heads) + rewrite_splits(shapes, rewrites)


def test_ranges_follow_the_map_and_the_quantized_graphs_agree(tmp_path: Path) -> None:
    case = module_case(OneTransformer(), 1, 4, 6, 6)
    mha = simulate(case)
    splits, keys = splits_of(case), list(case.adapter.model.state_dict())
    write_encodings(tmp_path / "mha.encodings", to_sections(mha))
    file = read_encodings_file(tmp_path / "mha.encodings")
    split = split_encodings(file, splits, keys)
    assert not split.left_out
    assert verify_parameter_encodings(file, split.file, splits) == sum(len(s.parts) for s in splits if s.to_convolution)
    split.file.write(tmp_path / "sha.encodings")
    rewritten = module_case(copy.deepcopy(case.adapter.model), 1, 4, 6, 6)
    SHAAttentionPatch.wrap_model("sha", rewritten.adapter.model).fuse()
    apply_rewrites(rewritten.adapter.model)
    simulation = load_simulation(tmp_path / "sha.encodings", rewritten.adapter, case.samples[0], mha.settings)
    # Sums in another order are rounded to the other neighbour on the 16-bit grid here and there.
    for inputs in case.samples:
        assert worst_sqnr_db(mha(inputs), simulation(inputs)) >= 60
    assert merge_encodings(split.file, splits, split.record) == file


@pytest.mark.parametrize("rewrites", [(), REWRITES], ids=["heads", "all"])
def test_the_stage_s_folder_says_which_form_its_weights_are_in(tmp_path: Path, rewrites: tuple[str, ...]) -> None:
    case = copy.deepcopy(shared_case("unet"))
    splits, folder = splits_of(case, rewrites), tmp_path / "unet"
    converted = split_state_dict(case.adapter.model.state_dict(), splits)
    save_tensors(converted, folder / "state_dict_sha.safetensors")
    heads = {layer.path: layer.heads for layer in case.adapter.attention_layers()}
    NameMap(tuple(splits), heads, rewrites=rewrites).save(folder)
    rewrite_to_sha(case.adapter, folder)
    assert case.adapter.model.state_dict().keys() == converted.keys()
    others = tuple(name for name in REWRITES if name not in rewrites)
    NameMap(tuple(splits), heads, rewrites=others).save(folder)
    with pytest.raises(CheckpointError, match="does not fit a UNet2DConditionModel"):
        rewrite_to_sha(copy.deepcopy(shared_case("unet")).adapter, folder)
