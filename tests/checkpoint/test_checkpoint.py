"""The first stage from the command line: what is no checkpoint is refused by name, and nothing is left behind."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdconvert.assets import asset_path
from sdconvert.cli.app import main

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass
class Finished:
    """What a command left."""

    returncode: int
    stderr: str


Read = Callable[[Path, Path], Finished]


@pytest.fixture
def read(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Read:
    """Run the command line up to the first stage, in this process: importing diffusers anew takes longer."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def call(folder: Path, build: Path) -> Finished:
        command = ["--json", "convert", "--to", "checkpoint", "--build", str(build)]
        with pytest.raises(SystemExit) as left:
            main([*command, "--set", f"checkpoint.path={folder}"])
        return Finished(int(str(left.value.code)), capsys.readouterr().err)

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(asset_path("pasd_tiny"), tmp_path / "model")
    return tmp_path / "model"


def truncate(folder: Path) -> None:
    path = folder / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def narrow(folder: Path) -> None:
    path = folder / "controlnet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_dim": 32}))


def unplug(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def empty(folder: Path) -> None:
    for child in folder.iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [(truncate, WEIGHTS), (narrow, "controlnet"), (unplug, "vae"), (empty, "no PASD folder")],
)
def test_a_damaged_folder_is_refused_by_name_and_the_next_run_goes_on(
    folder: Path, tmp_path: Path, read: Read, damage: Callable[[Path], None], named: str
) -> None:
    build = tmp_path / "build"
    damage(folder)
    refused = read(folder, build)
    assert refused.returncode == 2, refused.stderr
    assert named in refused.stderr
    assert "hint:" in refused.stderr
    assert not list(build.rglob("10-checkpoint*"))
    shutil.rmtree(folder)
    shutil.copytree(asset_path("pasd_tiny"), folder)
    assert read(folder, build).returncode == 0


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path, read: Read) -> None:
    refused = read(tmp_path / "nowhere", tmp_path / "build")
    assert refused.returncode == 2
    assert "nowhere" in refused.stderr


def test_the_facts_name_every_attention_layer_with_its_heads(folder: Path, tmp_path: Path, read: Read) -> None:
    assert read(folder, tmp_path / "build").returncode == 0
    facts = json.loads((tmp_path / "build" / "pasd_tiny" / "10-checkpoint" / "model.json").read_text())
    kinds = [layer["kind"] for layer in facts["unet"]["attention_layers"]]
    assert {"self", "cross", "pixel"} == set(kinds)
    assert all(layer["heads"] > 1 for layer in facts["unet"]["attention_layers"])
