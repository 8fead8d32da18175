"""Fixtures that more than one folder of tests needs."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# A file is one piece of work for a worker: the longest come first, so that no worker ends alone.
LONG = {
    "test_four_backends.py",
    "test_onnx_graph.py",
    "test_proof_on_samples.py",
    "test_road.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files; tests of a file stay together, and in order."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    """Keep workers of a parallel run from fighting over the cores."""
    torch.set_num_threads(1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 128 KiB; needs the right to mount, and skips without it."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
