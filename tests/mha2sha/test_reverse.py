"""There and back: the MHA form that `--reverse` writes is the original, tensors, encodings, order and all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from mha_folder import write_folder
from static_graphs import shared_case, shared_simulation

from sdconvert.errors import CheckpointError, SdconvertError, UsageError
from sdconvert.io.tensors import load_tensors, save_tensors
from sdconvert.mha2sha.command import convert_folder, reverse_folder
from sdconvert.mha2sha.name_map import NAME


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case, simulation = shared_case("small_controlnet"), shared_simulation("small_controlnet")
    return write_folder(tmp_path_factory.mktemp("reverse") / "mha", case, simulation, suffix="pth")


@pytest.fixture(scope="module")
def converted(original: Path) -> Path:
    convert_folder(original, original.parent / "sha")
    return original.parent / "sha"


def require_equal(folder: Path, original: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in original.iterdir())
    for path in original.iterdir():
        if path.suffix in (".pth", ".safetensors", ".bin"):
            expected, found = load_tensors(path), load_tensors(folder / path.name)
            assert list(expected) == list(found)
            assert all(torch.equal(expected[key], found[key]) for key in expected)
            assert all(expected[key].dtype == found[key].dtype for key in expected)
        else:
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_original_comes_back(original: Path, converted: Path, tmp_path: Path) -> None:
    summary = reverse_folder(converted, tmp_path / "back")
    require_equal(tmp_path / "back", original)
    assert summary.tensors_before == summary.verified_tensors
    assert summary.tensors_after == len(load_tensors(original / "state_dict_mha.pth"))
    assert summary.verified_grids


def test_a_diffusers_folder_comes_back_under_its_names(tmp_path: Path) -> None:
    case = shared_case("unet")
    folder = tmp_path / "unet"
    folder.mkdir()
    save_tensors(case.adapter.model.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(case.adapter.config()))
    summary = convert_folder(folder, tmp_path / "sha")
    assert summary.files == ("config.json", "diffusion_pytorch_model.safetensors", NAME)
    reverse_folder(tmp_path / "sha", tmp_path / "back")
    require_equal(tmp_path / "back", folder)


def test_one_file_needs_heads_and_comes_back(original: Path, tmp_path: Path) -> None:
    file = tmp_path / "my_unet.pth"
    shutil.copy(original / "state_dict_mha.pth", file)
    with pytest.raises(UsageError, match="so the head counts are unknown"):
        convert_folder(file, tmp_path / "sha")
    heads = tmp_path / "heads_by_layer.json"
    heads.write_text(json.dumps({"*": 2}))
    convert_folder(file, tmp_path / "by_file", heads_file=heads)
    summary = convert_folder(file, tmp_path / "sha", num_heads=2, verify=False)
    assert summary.verified_tensors is None
    assert (tmp_path / "by_file" / "my_unet.pth").read_bytes() == (tmp_path / "sha" / "my_unet.pth").read_bytes()
    with pytest.raises(UsageError, match="are both given"):
        convert_folder(file, tmp_path / "both", num_heads=2, heads_file=heads)


def drop_a_tensor(folder: Path) -> None:
    tensors = load_tensors(folder / "state_dict_sha.pth")
    tensors = {key: tensor.clone() for key, tensor in tensors.items() if not key.endswith("to_k_convs.1.weight")}
    save_tensors(tensors, folder / "state_dict_sha.pth")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / NAME).unlink(), "is no name map"),
        (
            lambda folder: (folder / "controlnet.encodings").unlink(),
            r"disagree on the encodings files: controlnet\.encodings",
        ),
        (lambda folder: (folder / "more.encodings").write_text("{}"), r"disagree on .*more\.encodings"),
        (lambda folder: (folder / "state_dict_sha.pth").unlink(), "holds no state_dict_sha"),
        (drop_a_tensor, "cannot give .*attn1.to_k.weight"),
    ],
)
def test_a_folder_that_is_not_as_it_was_written_is_refused(converted: Path, tmp_path: Path, damage, message) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(converted, tmp_path / "sha")
    damage(tmp_path / "sha")
    with pytest.raises(SdconvertError, match=message):
        reverse_folder(tmp_path / "sha", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_an_mha_folder_has_nothing_to_reverse(original: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no name map"):
        reverse_folder(original, tmp_path / "back")
