"""Ranges of MHA become ranges of SHA: for every option of attention, exactly the tensors that the SHA graph has."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0, StableAudioAttnProcessor2_0
from static_graphs import Case, ModuleAdapter, simulate
from torch import Tensor, nn

from sdconvert.errors import EncodingsError
from sdconvert.io.encodings import parse_encodings, read_encodings, read_encodings_file, write_encodings
from sdconvert.metrics import worst_sqnr_db
from sdconvert.mha2sha.encodings import merge_encodings, split_encodings
from sdconvert.mha2sha.encodings_positions import split_positions
from sdconvert.mha2sha.heads import LayerHeads, head_splits
from sdconvert.mha2sha.state_dict import split_state_dict
from sdconvert.models.attention import SHAAttentionPatch
from sdconvert.quantize.files import from_sections, to_sections

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "mask": {"mask": True},
    "one head": {"heads": 1},
    "residual": {"residual_connection": True},
    "mask and residual": {"mask": True, "residual_connection": True, "rescale_output_factor": 2.0},
    "qk_norm": {"qk_norm": "layer_norm"},
    "fewer heads for keys": {"kv_heads": 2, "processor": StableAudioAttnProcessor2_0()},
    "fewer heads for keys, normalized": {
        "kv_heads": 2,
        "qk_norm": "layer_norm",
        "processor": StableAudioAttnProcessor2_0(),
    },
    "cross_attention_norm": {"cross_attention_norm": "layer_norm"},
    "added keys": {"added_kv_proj_dim": 12, "norm_num_groups": 4, "processor": AttnAddedKVProcessor2_0()},
}


class Layer(nn.Module):
    """One attention to a fixed text, between two layers, so that its path has a name."""

    def __init__(self, mask: bool = False, **options: Any) -> None:
        super().__init__()
        self.before = nn.Conv2d(16, 16, 1)
        context = {} if "added_kv_proj_dim" in options else {"cross_attention_dim": 12}
        self.attn = Attention(**({"query_dim": 16, "heads": 4, "dim_head": 4} | context | options))
        self.takes_image = "added_kv_proj_dim" in options
        self.text = nn.Parameter(torch.randn(1, 5, 12))
        self.mask = nn.Parameter(torch.randn(1, 1, 5)) if mask else None

    def forward(self, x: Tensor) -> Tensor:
        """(1, 16, 2, 3) -> the same or tokens."""
        image = self.before(x)
        # Added keys and values are for images only.
        hidden = image if self.takes_image else image.flatten(2).transpose(1, 2)
        output: Tensor = self.attn(hidden, encoder_hidden_states=self.text, attention_mask=self.mask)
        return output


def layer_case(options: dict[str, Any]) -> Case:
    torch.manual_seed(0)
    module = Layer(**options).eval()
    for parameter in module.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    samples = [{"x": torch.randn(1, 16, 2, 3)} for _ in range(2)]
    return Case(ModuleAdapter(module), dict(samples[0]), samples)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_result_is_what_the_sha_graph_takes(name: str, tmp_path: Path) -> None:
    options = OPTIONS[name]
    case = layer_case(options)
    mha = simulate(case)
    expected = [mha(inputs) for inputs in case.samples]
    write_encodings(tmp_path / "mha.encodings", to_sections(mha))
    state = case.adapter.model.state_dict()
    splits = head_splits({key: tuple(t.shape) for key, t in state.items()}, {"attn": options.get("heads", 4)})
    file = read_encodings_file(tmp_path / "mha.encodings")
    result = split_encodings(file, splits, list(state))
    result.file.write(tmp_path / "sha.encodings")
    (patch,) = SHAAttentionPatch.wrap_model("sha", case.adapter.model).values()
    patch.fuse()
    case.adapter.model.load_state_dict(split_state_dict(state, splits))
    sha = simulate(case)
    own = to_sections(sha)
    for section, found in (
        ("activation_encodings", result.file.modules),
        ("functional_encodings", result.file.functional),
    ):
        assert found.keys() == own[section].keys()
        for path, places in found.items():
            assert places.keys() == own[section][path].keys(), path
    sha.load(from_sections(read_encodings(tmp_path / "sha.encodings"), sha))
    for inputs, reference in zip(case.samples, expected, strict=True):
        assert worst_sqnr_db(reference, sha(inputs)) >= 60
    back = merge_encodings(parse_encodings(result.file.dumps()), splits, json.loads(json.dumps(result.record)))
    assert back.dumps() == file.dumps()


PLAIN = ("mul.0", "matmul.0", "matmul.0.second", "softmax.0", "matmul.1", "matmul.1.second")


def test_ranges_of_whole_layers_can_be_kept_for_the_reverse() -> None:
    layer = {name: {"bitwidth": 16, "dtype": "float"} for name in PLAIN}
    output = {"output": {"0": {"bitwidth": 16, "dtype": "float"}}}
    modules = dict.fromkeys(("attn.to_q", "attn.to_out.0", "attn.dropout", "norm", "attn_norm"), output)
    content = {"activation_encodings": modules, "functional_encodings": {"attn": layer}, "param_encodings": {}}
    file = parse_encodings(json.dumps(content))
    shapes = {f"attn.to_{name}.weight": (4, 2) for name in "qkv"}
    splits = head_splits(shapes, {"attn": 2})
    result = split_encodings(file, splits, list(shapes), keep_ranges=True)
    changed = json.loads(result.file.dumps())
    for entry in changed["functional_encodings"]["attn"].values():
        entry["bitwidth"] = 32
    # All that an attention makes may change, whatever its name; nothing else does.
    for path, places in changed["activation_encodings"].items():
        places["output"]["0"]["bitwidth"] = 32 if path.startswith("attn.") else 16
    merged = merge_encodings(parse_encodings(json.dumps(changed)), splits, json.loads(json.dumps(result.record)))
    assert merged.dumps() == file.dumps()


@pytest.mark.parametrize("names", [PLAIN, PLAIN[::-1], sorted(PLAIN)])
def test_plain_attention_is_known_in_any_order(names: list[str]) -> None:
    found = {one.name: one.children for one in split_positions("attn", names, LayerHeads(2, 2, 4))}
    assert found["matmul.0.second"] == ("matmul.0.second", "matmul.2.second")
    assert found["matmul.1"] == ("matmul.1", "matmul.3", "cat.0")
    assert list(found) == list(names)


@pytest.mark.parametrize(
    ("names", "odd"),
    [
        (("matmul.0", "matmul.1"), "softmax.0"),
        (("mul.0", "mul.1", "matmul.0", "softmax.0", "matmul.1"), "mul.1"),
        (("matmul.0", "mul.0", "softmax.0", "matmul.1"), "mul.0"),
        (sorted([*PLAIN, "add.0"]), "add.0"),
        (("cat.0", "matmul.0", "softmax.0", "matmul.1"), "cat.0"),
        (("matmul.0", "softmax.0", "matmul.1", "softmax.0.second"), "softmax.0.second"),
    ],
)
def test_other_forwards_are_refused_by_name(names: list[str], odd: str) -> None:
    with pytest.raises(EncodingsError, match=r"attention `attn` is not scale, matmul, softmax, matmul") as error:
        split_positions("attn", names, LayerHeads(2, 2, 4))
    assert odd in str(error.value)
