"""Which files a source has, and what they are called in the other form."""

from pathlib import Path

import pytest

from sdconvert.errors import CheckpointError
from sdconvert.mha2sha.source import find_source, renamed, stem


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["state_dict_mha.pth"], "state_dict_mha.pth"),
        (["state_dict_mha.safetensors", "diffusion.txt"], "state_dict_mha.safetensors"),
        (["diffusion_pytorch_model.bin", "config.json"], "diffusion_pytorch_model.bin"),
        (["diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model.fp16.safetensors"),
        (["model.safetensors"], "model.safetensors"),
        (
            [
                "diffusion_pytorch_model-00001-of-00002.safetensors",
                "diffusion_pytorch_model-00002-of-00002.safetensors",
                "diffusion_pytorch_model.safetensors.index.json",
            ],
            "diffusion_pytorch_model.safetensors.index.json",
        ),
    ],
)
def test_the_weights_of_a_folder(tmp_path: Path, names: list[str], weights: str) -> None:
    source = find_source(touch(tmp_path, *names))
    assert source.weights == tmp_path / weights
    assert (source.config is not None) == ("config.json" in names)


def test_encodings_of_parameters_come_first(tmp_path: Path) -> None:
    touch(tmp_path, "state_dict_mha.pth", "a.encodings", "parameters_mha.encodings", "unet_torch.encodings")
    names = [path.name for path in find_source(tmp_path).encodings]
    assert names == ["parameters_mha.encodings", "a.encodings", "unet_torch.encodings"]


def test_a_file_stands_alone(tmp_path: Path) -> None:
    touch(tmp_path, "unet.pth", "config.json", "a.encodings")
    source = find_source(tmp_path / "unet.pth")
    assert (source.config, source.encodings) == (None, ())


@pytest.mark.parametrize(
    ("names", "what", "message"),
    [
        ([], ".", "found: nothing"),
        (["sha/state_dict_sha.pth"], "sha", "holds no state_dict_mha.* found: state_dict_sha.pth"),
        (["state_dict_mha.pth", "state_dict_mha.safetensors"], ".", "holds both .*safetensors and .*pth"),
        (["model.bin", "model.safetensors"], ".", "holds both"),
        (["model_index.json", "unet/config.json", "vae/config.json"], ".", "is a pipeline, not one model"),
        (["notes.txt"], "notes.txt", "is no weights file"),
        ([], "gone", "found: no folder"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path: Path, names: list[str], what: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_source(touch(tmp_path, *names) / what)


@pytest.mark.parametrize(
    ("mha", "sha"),
    [
        ("state_dict_mha.safetensors", "state_dict_sha.safetensors"),
        ("state_dict_mha.safetensors.index.json", "state_dict_sha.safetensors.index.json"),
        ("parameters_mha.encodings", "parameters_sha.encodings"),
        ("unet.encodings", "unet.encodings"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.bin"),
    ],
)
def test_names_that_carry_the_form_change(mha: str, sha: str) -> None:
    assert renamed(mha, "sha") == sha
    assert renamed(sha, "mha") == mha


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("state_dict_mha.pth", "state_dict_mha"),
        ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16"),
        ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model"),
    ],
)
def test_stems(name: str, expected: str) -> None:
    assert stem(Path(name)) == expected
