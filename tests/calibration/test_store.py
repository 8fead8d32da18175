"""Graph inputs on disk come back as they were written, in order, over any number of shards."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdconvert.calibration import store
from sdconvert.calibration.store import ActivationStore, ActivationWriter
from sdconvert.errors import CheckpointError, PreconditionError, UsageError


@contextmanager
def shards_of(size: int) -> Iterator[Path]:
    """A folder, and shards that are written when they have `size` bytes."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_SHARD_BYTES", size)
        yield Path(folder) / "unet"


keys = st.fixed_dictionaries(
    {
        "picture": st.sampled_from(["rocket", "astro-naut", "1"]),
        "step": st.integers(0, 30),
        "side": st.sampled_from(["positive", "negative"]),
        "tile": st.integers(0, 9),
    }
)
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@given(
    st.lists(keys, min_size=1, max_size=9, unique_by=lambda key: tuple(key.values())),
    st.dictionaries(st.sampled_from(["sample", "t_emb", "mid_block_additional_residual"]), shapes, min_size=1),
    st.integers(1, 2000),
    st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_samples_come_back_in_order(
    samples: list[dict[str, Any]], inputs: dict[str, list[int]], shard_bytes: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    written = [{name: torch.randn(shape, generator=generator) for name, shape in inputs.items()} for _ in samples]
    with shards_of(shard_bytes) as folder:
        writer = ActivationWriter(folder)
        for tensors, sample in zip(written, samples, strict=True):
            writer.add(tensors, **sample)
        writer.close()
        found = ActivationStore(folder)
        assert len(found) == len(samples)
        for (info, tensors), sample, reference in zip(found.samples(), samples, written, strict=True):
            assert {name: getattr(info, name) for name in sample} == sample
            assert list(tensors) == list(reference)
            assert all(torch.equal(tensors[name], reference[name]) for name in reference)
        assert [list(tensors) for tensors in found] == [list(inputs)] * len(samples)
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        assert files == sorted({info.shard for info in found.infos})


@pytest.mark.parametrize(("shard_bytes", "shards"), [(1, 6), (4000, 6), (4001, 3), (8001, 2), (1 << 20, 1)])
def test_a_shard_ends_when_it_is_full(shard_bytes: int, shards: int) -> None:
    with shards_of(shard_bytes) as folder:
        writer = ActivationWriter(folder)
        for step in range(6):
            writer.add({"sample": torch.zeros(1000)}, picture="a", step=step, side="positive", tile=0)
        writer.close()
        assert len(list(folder.glob("inputs-*.safetensors"))) == shards


def test_what_is_added_is_kept_as_it_was_then(tmp_path: Path) -> None:
    writer, latents = ActivationWriter(tmp_path / "unet"), torch.zeros(3)
    writer.add({"sample": latents}, picture="a", step=0, side="positive", tile=0)
    latents += 1
    writer.close()
    (tensors,) = ActivationStore(tmp_path / "unet")
    assert torch.equal(tensors["sample"], torch.zeros(3))


def test_a_store_without_an_index_is_none(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match=r"unet` holds no calibration samples"):
        ActivationStore(tmp_path / "unet")
    writer = ActivationWriter(tmp_path / "unet")
    writer.add({"sample": torch.zeros(1)}, picture="a", step=0, side="positive", tile=0)
    with pytest.raises(PreconditionError):
        ActivationStore(tmp_path / "unet")
    writer.close()
    assert len(ActivationStore(tmp_path / "unet")) == 1


def test_a_lost_shard_is_named(tmp_path: Path) -> None:
    writer = ActivationWriter(tmp_path / "unet")
    writer.add({"sample": torch.zeros(1)}, picture="a", step=0, side="positive", tile=0)
    writer.close()
    (tmp_path / "unet" / "inputs-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"inputs-00000\.safetensors` does not exist"):
        list(ActivationStore(tmp_path / "unet"))


def test_no_folder_is_written_into_twice(tmp_path: Path) -> None:
    ActivationWriter(tmp_path / "unet").close()
    with pytest.raises(FileExistsError):
        ActivationWriter(tmp_path / "unet")


def test_two_samples_of_one_name_are_refused(tmp_path: Path) -> None:
    writer = ActivationWriter(tmp_path / "unet")
    writer.add({"x": torch.zeros(1)}, picture="cat", step=0, side="positive", tile=0)
    with pytest.raises(UsageError, match="cat-0-positive-0"):
        writer.add({"x": torch.ones(1)}, picture="cat", step=0, side="positive", tile=0)
