"""Tensors come back as they were, wherever they waited; memory stays within the budget; no file stays behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdconvert.errors import EnvironmentProblem, UsageError
from sdconvert.quantize.adaround.storage import compact
from sdconvert.quantize.adaround.store import ActivationStore

MIB = 1 << 20


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_read_does_not_depend_on_the_budget(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "small": 1e-6 * torch.randn(3, 5, generator=generator),
        "large": 1e7 * torch.randn(2, 2, 4, generator=generator),
        "strided": torch.randn(6, 6, generator=generator).T[::2],
        "timestep": torch.tensor([981]),
        "scalar": torch.tensor(0.1),
        "zeros": torch.zeros(3),
        "empty": torch.zeros(0, 4),
        "broken": torch.tensor([1.0, float("nan"), float("inf")]),
    }
    read = []
    for budget in (0, 100, MIB):
        with ActivationStore(budget, tmp_path / "store", dtype) as store:
            for name, tensor in tensors.items():
                store.put(name, tensor, 1)
            assert store.peak_memory_bytes <= budget
            assert (store.peak_disk_bytes > 0) == (budget < MIB)
            assert sum(path.stat().st_size for path in files(tmp_path)) == store.disk_bytes
            read.append({name: store.take(name) for name in tensors})
            assert (store.memory_bytes, store.disk_bytes, len(store)) == (0, 0, 0)
            assert files(tmp_path) == []
    for name, tensor in tensors.items():
        for found in read:
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name].nan_to_num(), read[0][name].nan_to_num())
        exact = dtype == torch.float32 or not tensor.is_floating_point() or name in ("zeros", "empty", "broken")
        allowed = 0 if exact else float(tensor.abs().max()) * 2**-11
        torch.testing.assert_close(read[0][name], tensor, rtol=0, atol=allowed, equal_nan=True)


@given(st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=20))
def test_half_precision_keeps_eleven_bits_of_the_largest_value(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    error = (compact(tensor, torch.float16).read() - tensor).abs().max()
    assert error <= tensor.abs().max() * 2**-11 + 1e-38


def test_reading_gives_memory_of_its_own(tmp_path: Path) -> None:
    with ActivationStore(MIB, tmp_path / "store", torch.float32) as store:
        given_tensor = torch.ones(4)
        store.put("x", given_tensor, 2)
        given_tensor.zero_()
        store.look("x").zero_()
        store.take("x").zero_()
        assert store.take("x").tolist() == [1, 1, 1, 1]


def test_wrong_uses_are_refused(tmp_path: Path) -> None:
    with ActivationStore(MIB, tmp_path / "store") as store:
        store.put("x", torch.ones(4), 1)
        for uses, key in ((1, "x"), (0, "y")):
            with pytest.raises(UsageError, match="cannot be stored"):
                store.put(key, torch.ones(4), uses)
        store.take("x")
        with pytest.raises(UsageError, match="not stored"):
            store.take("x")


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    child = os.fork()
    if child == 0:
        try:
            ActivationStore(0, folder).put("x", torch.ones(9), 1)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert files(tmp_path)
    with ActivationStore(0, folder) as store:
        assert files(tmp_path) == []
        store.put("y", torch.ones(9), 1)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_says_so_and_loses_nothing(small_disk: Path) -> None:
    with ActivationStore(100_000, small_disk / "store", torch.float32) as store:
        store.put("memory", torch.ones(25_000), 1)
        store.put("disk", torch.ones(20_000), 1)
        with pytest.raises(EnvironmentProblem, match="no space left"):
            store.put("too much", torch.ones(25_000), 1)
        assert "too much" not in store
        assert store.take("disk").sum() == 20_000
        store.put("again", torch.ones(20_000), 1)
        assert store.take("memory").sum() == 25_000
    assert list(small_disk.iterdir()) == []


def test_memory_is_that_of_the_budget(tmp_path: Path) -> None:
    """256 MiB of samples in 16 MiB: the process grows by the budget and one sample, not by the data."""
    code = f"""
import pathlib, torch
from sdconvert.memory import PeakMemory
from sdconvert.quantize.adaround.store import ActivationStore
torch.set_num_threads(1)
sample = torch.ones(1 << 20)
with ActivationStore({16 * MIB}, pathlib.Path({str(tmp_path / "store")!r}), torch.float32) as store:
    store.put(-1, sample, 1)
    store.take(-1)
    memory = PeakMemory()
    before = memory.peak_bytes()
    for index in range(64):
        store.put(index, sample * index, 2)
    for _ in range(2):
        assert all(store.take(index)[0] == index for index in range(64))
    print(memory.peak_bytes() - before, store.peak_memory_bytes, store.peak_disk_bytes)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    grown, memory, disk = map(int, done.stdout.split())
    assert (memory, disk) == (16 * MIB, 240 * MIB)
    assert grown < 48 * MIB
