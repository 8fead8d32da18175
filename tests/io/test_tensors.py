"""Weights survive a round trip bit by bit, and no damaged file passes for a good one."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stored_weights import layouts, same
from torch import Tensor

from sdconvert.errors import CheckpointError, EnvironmentProblem, UsageError
from sdconvert.io.tensors import load_tensors, save_tensors, tensor_shapes
from sdconvert.io.weights_index import weights_file

FORMATS = [".safetensors", ".pth", ".pt", ".bin"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@given(tensors=st.dictionaries(st.text("abc._0", min_size=1, max_size=8), layouts(), max_size=4))
def test_round_trip_is_bit_exact_in_any_layout(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, tensors: dict[str, Tensor]
) -> None:
    path = tmp_path_factory.mktemp("weights") / f"weights{suffix}"
    save_tensors(tensors, path)
    loaded = load_tensors(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(loaded[name], tensor)
    assert tensor_shapes(path) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("suffix", FORMATS)
def test_shared_memory_becomes_independent_tensors(tmp_path: Path, suffix: str) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    save_tensors({"base": base, "same": base, "row": base[1]}, tmp_path / f"weights{suffix}")
    loaded = load_tensors(tmp_path / f"weights{suffix}")
    loaded["base"].zero_()
    assert torch.equal(loaded["same"], base)
    assert torch.equal(loaded["row"], base[1])


def test_a_slice_takes_only_its_own_bytes(tmp_path: Path) -> None:
    save_tensors({"row": torch.zeros(1000, 1000)[0]}, tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").stat().st_size < 10_000


def test_dtype_casts_floats_and_leaves_integers(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_tensors({"weight": torch.ones(2, dtype=torch.float16), "ids": torch.arange(2)}, path)
    loaded = load_tensors(path, dtype=torch.float32)
    assert (loaded["weight"].dtype, loaded["ids"].dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("read", [load_tensors, tensor_shapes])
@given(cut=st.floats(0, 1, exclude_max=True))
def test_no_truncation_goes_unnoticed(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, read: object, cut: float
) -> None:
    path = tmp_path_factory.mktemp("weights") / f"weights{suffix}"
    save_tensors({"weight": torch.rand(5, 7), "bias": torch.rand(5)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * cut)])
    with pytest.raises(CheckpointError, match="weights.*bytes") as caught:
        read(path)  # type: ignore[operator]
    assert caught.value.hint


def test_old_torch_format_is_read(tmp_path: Path) -> None:
    tensors = {"weight": torch.rand(2, 3)}
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(load_tensors(tmp_path / "old.bin")["weight"], tensors["weight"])
    assert tensor_shapes(tmp_path / "old.bin") == {"weight": (2, 3)}


def test_nested_dicts_and_code_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "epoch": 3}, tmp_path / "nested.pth")
    with pytest.raises(CheckpointError, match="'state_dict' is a dict, 'epoch' is a int"):
        load_tensors(tmp_path / "nested.pth")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pth")
    with pytest.raises(CheckpointError):
        load_tensors(tmp_path / "module.pth")


def test_missing_unknown_and_folder_are_named(tmp_path: Path) -> None:
    for name, found in [("none.bin", "does not exist"), ("weights.onnx", "no weights file")]:
        with pytest.raises(CheckpointError, match=found):
            load_tensors(tmp_path / name)
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        tensor_shapes(tmp_path / "folder.pth")


def test_impossible_requests_are_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="suffix"):
        save_tensors({}, tmp_path / "weights.npz")
    with pytest.raises(UsageError, match="metadata"):
        save_tensors({}, tmp_path / "weights.pth", metadata={"a": "b"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_full_disk_says_so_and_keeps_what_was_there(small_disk: Path, suffix: str) -> None:
    path = small_disk / f"weights{suffix}"
    save_tensors({"weight": torch.ones(3)}, path)
    with pytest.raises(EnvironmentProblem, match="no space left") as caught:
        save_tensors({"weight": torch.zeros(1000, 1000)}, path)
    assert "free some space" in caught.value.hint
    assert list(small_disk.iterdir()) == [path]
    assert torch.equal(load_tensors(path)["weight"], torch.ones(3))


def test_weights_file_prefers_safetensors_and_lists_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(CheckpointError, match="it holds config.json"):
        weights_file(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").touch()
    assert weights_file(tmp_path).suffix == ".bin"
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    assert weights_file(tmp_path).suffix == ".safetensors"
    (tmp_path / "pytorch_model.bin").touch()
    assert weights_file(tmp_path, stem="model").name == "pytorch_model.bin"
    with pytest.raises(CheckpointError, match="not a folder"):
        weights_file(tmp_path / "none")
