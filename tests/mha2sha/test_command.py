"""`convert_folder` on the quantize stage's kind of folder: every file, every shape of it, every way to go wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mha_folder import write_folder
from static_graphs import golden_case, shared_case, shared_simulation, simulate, small_controlnet_case

from sdconvert.errors import CheckpointError, EncodingsError, SdconvertError, UsageError
from sdconvert.io.encodings import read_encodings, write_encodings, write_params
from sdconvert.io.files import sha256_folder
from sdconvert.io.tensors import load_tensors, save_tensors
from sdconvert.metrics import max_abs, worst_sqnr_db
from sdconvert.mha2sha.artifact import Mha2ShaArtifact
from sdconvert.mha2sha.command import convert_folder
from sdconvert.mha2sha.forms import rewrite_to_sha
from sdconvert.mha2sha.heads import attention_paths
from sdconvert.models.attention import SHAAttention

# Small: the slow test, and tests/test_road.py, convert a UNet with every kind of attention.
GRAPH = "small_controlnet"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "mha", shared_case(GRAPH), shared_simulation(GRAPH))


@pytest.mark.slow
def test_the_reference_s_unet_computes_the_same_per_head(tmp_path: Path) -> None:
    """In fp32 to rounding; quantized, every head has the parent's grids, so the same to the last bits."""
    case = golden_case("unet")
    simulation = simulate(case)
    expected = [(case.adapter.run(inputs), simulation(inputs)) for inputs in case.samples]
    write_folder(tmp_path / "mha", case, simulation)
    summary = convert_folder(tmp_path / "mha", tmp_path / "out" / "unet")
    converted = Mha2ShaArtifact(tmp_path / "out")
    sha = converted.simulation("unet", case.adapter, case.samples[0], simulation.settings)
    state = case.adapter.model.state_dict()
    assert not any(".to_q." in key or ".to_k." in key or ".to_v." in key for key in state)
    assert sum(isinstance(m, SHAAttention) for m in case.adapter.model.modules()) == summary.attention_layers
    for inputs, (fp32, quantized) in zip(case.samples, expected, strict=True):
        error = max_abs(fp32["out_sample"], case.adapter.run(inputs)["out_sample"])
        assert error <= 1e-5 * float(fp32["out_sample"].abs().max())
        assert worst_sqnr_db(quantized, sha(inputs)) >= 50


def test_every_file_is_converted(source: Path, tmp_path: Path) -> None:
    summary = convert_folder(source, tmp_path / "sha")
    layers = shared_case(GRAPH).adapter.attention_layers()
    assert (summary.attention_layers, summary.heads) == (len(layers), sum(layer.heads for layer in layers))
    names = (
        "config.json",
        "controlnet.encodings",
        "heads.json",
        "parameters_sha.encodings",
        "state_dict_sha.safetensors",
    )
    assert summary.files == names
    assert sorted(path.name for path in (tmp_path / "sha").iterdir()) == sorted(summary.files)
    state = load_tensors(tmp_path / "sha" / "state_dict_sha.safetensors")
    before = load_tensors(source / "state_dict_mha.safetensors")
    assert (summary.tensors_before, summary.tensors_after) == (len(before), len(state))
    flat = read_encodings(tmp_path / "sha" / "parameters_sha.encodings")["param_encodings"]
    assert json.loads((tmp_path / "sha" / "parameters_sha.encodings").read_text()) == flat
    assert flat == read_encodings(tmp_path / "sha" / "controlnet.encodings")["param_encodings"]
    # A ControlNet's `to_rgbs` are no part of the graph.
    assert flat.keys() == {key for key in state if not key.endswith("bias") and ".to_rgbs." not in key}
    assert all(len(entries) in (1, state[key].shape[0]) for key, entries in flat.items())
    assert (tmp_path / "sha" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_the_source_is_not_touched(source: Path, tmp_path: Path) -> None:
    before = sha256_folder(source)
    convert_folder(source, tmp_path / "sha")
    assert sha256_folder(source) == before


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("format", [None, "safetensors", "pth"])
def test_both_formats_of_weights_go_in_and_out(tmp_path: Path, suffix: str, format: str | None) -> None:
    source = write_folder(tmp_path / "mha", shared_case(GRAPH), shared_simulation(GRAPH), suffix)
    convert_folder(source, tmp_path / "sha", format=format)
    state = load_tensors(tmp_path / "sha" / f"state_dict_sha.{format or suffix}")
    parents = load_tensors(source / f"state_dict_mha.{suffix}")
    for path in attention_paths(parents):
        heads = [key for key in state if key.startswith(f"{path}.to_v_convs.")]
        assert torch.equal(torch.cat([state[key][:, :, 0, 0] for key in heads]), parents[f"{path}.to_v.weight"])


@pytest.mark.parametrize("kept", ["state_dict_mha.safetensors", "parameters_mha.encodings", "controlnet.encodings"])
def test_encodings_are_converted_where_there_are_any(source: Path, tmp_path: Path, kept: str) -> None:
    for path in source.glob("*.encodings"):
        if path.name != kept:
            path.unlink()
    files = convert_folder(source, tmp_path / "sha").files
    names = {"parameters_mha.encodings": "parameters_sha.encodings", "controlnet.encodings": "controlnet.encodings"}
    always = {"config.json", "heads.json", "state_dict_sha.safetensors"}
    assert set(files) == always | {names[kept] for _ in range(kept in names)}


def test_parameter_files_of_both_shapes_are_read(source: Path, tmp_path: Path) -> None:
    convert_folder(source, tmp_path / "flat")
    path = source / "parameters_mha.encodings"
    path.write_text(json.dumps({"param_encodings": json.loads(path.read_text())}))
    convert_folder(source, tmp_path / "nested")
    flat, nested = (
        json.loads((folder / "parameters_sha.encodings").read_text())
        for folder in (tmp_path / "flat", tmp_path / "nested")
    )
    assert nested == {"param_encodings": flat}


def test_per_tensor_encodings_go_to_every_head(source: Path, tmp_path: Path) -> None:
    path = source / "parameters_mha.encodings"
    (source / "controlnet.encodings").unlink()
    params = {key: entries[:1] for key, entries in read_encodings(path)["param_encodings"].items()}
    write_params(path, params)
    convert_folder(source, tmp_path / "sha")
    result = read_encodings(tmp_path / "sha" / "parameters_sha.encodings")["param_encodings"]
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert [result[f"{layer}.to_k_convs.{head}.weight"] for head in range(2)] == [params[f"{layer}.to_k.weight"]] * 2


def test_heads_are_asked_for_only_without_a_config(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--num-heads has no effect: .*says the head count"):
        convert_folder(source, tmp_path / "sha", num_heads=2)
    convert_folder(source, tmp_path / "with")
    (source / "config.json").unlink()
    with pytest.raises(UsageError, match="has no config.json") as error:
        convert_folder(source, tmp_path / "sha")
    assert "--num-heads" in error.value.hint
    convert_folder(source, tmp_path / "without", num_heads=2)
    files = [tmp_path / name / "state_dict_sha.safetensors" for name in ("with", "without")]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(CheckpointError, match="which 3 heads do not divide"):
        convert_folder(source, tmp_path / "sha", num_heads=3)


def test_a_second_run_over_its_own_output_is_an_error(source: Path, tmp_path: Path) -> None:
    convert_folder(source, tmp_path / "sha")
    with pytest.raises(CheckpointError, match="holds no state_dict_mha"):
        convert_folder(tmp_path / "sha", tmp_path / "again")
    (tmp_path / "sha" / "state_dict_sha.safetensors").rename(tmp_path / "sha" / "state_dict_mha.safetensors")
    with pytest.raises(CheckpointError, match="the weights are in SHA form already"):
        convert_folder(tmp_path / "sha", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_second_run_takes_the_place_of_the_first(source: Path, tmp_path: Path) -> None:
    convert_folder(source, tmp_path / "sha", format="pth")
    convert_folder(source, tmp_path / "sha")
    assert not (tmp_path / "sha" / "state_dict_sha.pth").exists()
    assert (tmp_path / "sha" / "state_dict_sha.safetensors").is_file()


def damage_encodings(source: Path) -> None:
    sections = read_encodings(source / "controlnet.encodings")
    key = next(key for key in sections["param_encodings"] if key.endswith("to_q.weight"))
    sections["param_encodings"][key] = sections["param_encodings"][key][:3]
    write_encodings(source / "controlnet.encodings", sections)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (damage_encodings, EncodingsError, "has 3 encodings: neither 1"),
        (lambda source: truncate(source / "controlnet.encodings"), EncodingsError, "cannot be read"),
        (lambda source: truncate(source / "state_dict_mha.safetensors"), CheckpointError, "cannot be read"),
        (lambda source: truncate(source / "config.json"), CheckpointError, "is no JSON"),
        (lambda source: (source / "config.json").write_text("[]"), CheckpointError, "holds a list"),
        (lambda source: (source / "config.json").write_text("{}"), UsageError, "names no heads"),
        (lambda source: (source / "state_dict_mha.pth").touch(), CheckpointError, "holds both"),
        (lambda source: (source / "state_dict_mha.safetensors").unlink(), CheckpointError, "found: config.json"),
        (shutil.rmtree, CheckpointError, "found: no folder"),
    ],
)
def test_a_failure_leaves_no_output(
    source: Path, tmp_path: Path, damage: Any, error: type[SdconvertError], message: str
) -> None:
    damage(source)
    with pytest.raises(error, match=message):
        convert_folder(source, tmp_path / "sha")
    assert [path.name for path in tmp_path.iterdir() if path != source] == []


def test_a_failure_keeps_the_earlier_output(source: Path, tmp_path: Path) -> None:
    convert_folder(source, tmp_path / "sha")
    before = sha256_folder(tmp_path / "sha")
    damage_encodings(source)
    with pytest.raises(EncodingsError):
        convert_folder(source, tmp_path / "sha")
    assert sha256_folder(tmp_path / "sha") == before


def test_a_request_that_cannot_be_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no format is called `onnx`"):
        convert_folder(source, tmp_path / "sha", format="onnx")
    with pytest.raises(UsageError, match="is the source itself"):
        convert_folder(source, source / ".." / source.name)


def test_weights_that_do_not_fit_the_rewritten_model_are_refused(source: Path, tmp_path: Path) -> None:
    (source / "config.json").unlink()
    convert_folder(source, tmp_path / "out" / "controlnet", num_heads=4)
    case = small_controlnet_case()
    before = case.adapter.run(case.samples[0])
    with pytest.raises(CheckpointError, match=r"does not fit a ControlNetModel: \d+ tensors .*to_k_convs"):
        rewrite_to_sha(case.adapter, tmp_path / "out" / "controlnet")
    torch.testing.assert_close(case.adapter.run(case.samples[0]), before, rtol=0, atol=1e-5)


def test_what_cannot_be_split_is_left_alone_only_if_asked(tmp_path: Path) -> None:
    shapes = {"even": 8, "odd": 9}
    state = {f"{layer}.to_{p}.weight": torch.randn(rows, 4) for layer, rows in shapes.items() for p in "qkv"}
    save_tensors(state, tmp_path / "unet.safetensors")
    with pytest.raises(CheckpointError, match="has 9 rows, which 4 heads do not divide"):
        convert_folder(tmp_path / "unet.safetensors", tmp_path / "sha", num_heads=4)
    summary = convert_folder(tmp_path / "unet.safetensors", tmp_path / "sha", num_heads=4, skip_unsupported=True)
    assert (summary.attention_layers, list(summary.left_alone)) == (1, ["odd"])
    assert "9 rows" in summary.left_alone["odd"]
    written = load_tensors(tmp_path / "sha" / "unet.safetensors")
    assert torch.equal(written["odd.to_q.weight"], state["odd.to_q.weight"])
    assert json.loads((tmp_path / "sha" / "heads.json").read_text())["left_alone"] == dict(summary.left_alone)
