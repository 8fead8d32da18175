"""The qnn stage's folder as later stages read it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdconvert.errors import PreconditionError
from sdconvert.io.tensors import flatten, save_tensors
from sdconvert.qnn.artifact import QnnArtifact
from sdconvert.qnn.context import Context


def test_contexts_and_figures_survive_moving_the_folder(
    compiled: Callable[[str, str], Context], tmp_path: Path
) -> None:
    written = [compiled("conv", soc) for soc in ("SM8650", "SM8475")]
    folder = written[0].bin.parent.parent
    artifact = QnnArtifact.write(folder, written, {"unet": {"sqnr_db": 37.5}})
    assert list(artifact.contexts.values()) == written
    moved = QnnArtifact(shutil.copytree(folder, tmp_path / "moved"))
    assert list(moved.contexts) == [("conv", "SM8650"), ("conv", "SM8475")]
    assert moved.figures == {"unet": {"sqnr_db": 37.5}}
    steps = [{"fp32": torch.zeros(1, 2), "simulator": torch.ones(1, 2)}, {"fp32": torch.ones(1, 2)}]
    (moved.folder / "steps").mkdir()
    save_tensors(flatten(steps), moved.folder / "steps/china-tile.safetensors")
    assert [one.keys() for one in moved.steps()["china-tile"]] == [one.keys() for one in steps]
    context = moved.contexts["conv", "SM8475"]
    assert context.bin == tmp_path / "moved" / "SM8475" / "conv_qnn.bin"
    assert context.bin.is_file()


def test_a_folder_without_contexts_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="holds no compiled contexts"):
        QnnArtifact(tmp_path)
