"""Graph inputs on disk come back as they were written, in order, over any number of shards."""

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdconvert.calibration import store
from sdconvert.calibration.store import ActivationStore, ActivationWriter, _spread
from sdconvert.errors import PreconditionError, UsageError


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
    st.lists(keys, min_size=1, max_size=9, unique_by=lambda key: tuple(sorted(key.items()))),
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


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished store in a run folder, three samples in a shard each."""
    folder = tmp_path / "build" / "tiny" / "20-calibration" / "calibration" / "unet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_SHARD_BYTES", 1)
        writer = ActivationWriter(folder)
        for step in range(3):
            inputs = {"sample": torch.full((4,), float(step))}
            writer.add(inputs, picture="cat", step=step, side="positive", tile=0)
        writer.close()
    (folder.parents[2] / "recipe.resolved.yaml").write_text("name: tiny\n")
    return folder


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"has \d+ bytes, \d+ were written"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_d9_a_truncated_or_lost_shard_is_found_on_open_with_the_command_to_redo_it(
    run_folder: Path, damage: Any, what: str
) -> None:
    damage(run_folder / "inputs-00001.safetensors")
    recipe = run_folder.parents[2] / "recipe.resolved.yaml"
    command = f"sdconvert convert {recipe} --build {recipe.parents[1]} --from calibration --fresh"
    with pytest.raises(PreconditionError, match=rf"inputs-00001\.safetensors` {what}") as caught:
        ActivationStore(run_folder)
    assert caught.value.hint == f"redo it: `{command}`"


def test_d9_a_changed_byte_is_found_when_its_shard_is_read(run_folder: Path) -> None:
    path = run_folder / "inputs-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    opened = ActivationStore(run_folder)
    assert opened.sample("cat", 0, "positive")
    with pytest.raises(PreconditionError, match="does not have the content that was written"):
        opened.sample("cat", 1, "positive")
    with pytest.raises(PreconditionError, match="content"):
        list(opened)


def test_d9_a_sample_is_found_by_picture_step_and_side(run_folder: Path) -> None:
    opened = ActivationStore(run_folder)
    assert torch.equal(opened.sample("cat", 2, "positive")["sample"], torch.full((4,), 2.0))
    with pytest.raises(UsageError, match=r"no sample `cat-3-positive-0`.*\n.*cat-2-positive-0"):
        opened.sample("cat", 3, "positive")
    with pytest.raises(UsageError, match=r"no sample `dog-0-positive-0`.*\n.*pictures are cat"):
        opened.sample("dog", 0, "positive")


def test_d9_a_writer_goes_on_behind_the_last_committed_picture(tmp_path: Path) -> None:
    def add(writer: ActivationWriter, picture: str, value: float) -> None:
        for step in range(2):
            inputs = {"x": torch.full((3,), value + step)}
            writer.add(inputs, picture=picture, step=step, side="positive", tile=0)

    whole = ActivationWriter(tmp_path / "whole")
    for value, picture in enumerate("abc"):
        add(whole, picture, value)
        whole.commit()
    whole.close()

    first = ActivationWriter(tmp_path / "parts", resume=True)
    add(first, "a", 0)
    first.commit()
    add(first, "b", 1)  # and then the process dies
    (tmp_path / "parts" / "inputs-00001.safetensors").write_bytes(b"half a shard")
    second = ActivationWriter(tmp_path / "parts", resume=True)
    for value, picture in enumerate("abc"):
        add(second, picture, value)
        second.commit()
    second.publish(tmp_path / "published")
    second.close()
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    for folder in ("parts", "published"):
        assert {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} == files


def test_no_folder_is_written_into_twice(tmp_path: Path) -> None:
    ActivationWriter(tmp_path / "unet").close()
    with pytest.raises(UsageError, match="exists already"):
        ActivationWriter(tmp_path / "unet")


def test_two_samples_of_one_name_are_refused(tmp_path: Path) -> None:
    writer = ActivationWriter(tmp_path / "unet")
    writer.add({"x": torch.zeros(1)}, picture="cat", step=0, side="positive", tile=0)
    with pytest.raises(UsageError, match="cat-0-positive-0"):
        writer.add({"x": torch.ones(1)}, picture="cat", step=0, side="positive", tile=0)


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=24, unique=True),
    st.data(),
)
def test_part_of_a_store_shows_every_timestep_as_often(calls: list[tuple[int, int]], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(calls)))
    chosen = _spread([step for _, step in calls], count)
    assert chosen == sorted(set(chosen)) and len(chosen) == count
    there = Counter(step for _, step in calls)
    taken = Counter(calls[index][1] for index in chosen)
    for one, other in itertools.permutations(there, 2):
        # Only a step that is used up may be behind another one by more than rounding.
        assert taken[one] >= taken[other] - 1 or taken[one] == there[one]


def test_a_part_is_a_store(tmp_path: Path) -> None:
    writer = ActivationWriter(tmp_path / "unet")
    for picture, step in itertools.product("ab", range(4)):
        writer.add({"x": torch.full((2,), float(step))}, picture=picture, step=step, side="posi", tile=0)
    writer.close()
    part = ActivationStore(tmp_path / "unet").spread(4)
    assert len(part) == 4
    assert sorted(float(one["x"][0]) for one in part) == [0, 1, 2, 3]
    assert {info.picture for info in part.infos} == {"a", "b"}
    assert len(ActivationStore(tmp_path / "unet")) == 8
    with pytest.raises(UsageError, match="9 samples are asked for, .* holds 8"):
        ActivationStore(tmp_path / "unet").spread(9)
