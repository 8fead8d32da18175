"""The first stage from the command line: what is no checkpoint is refused by name, and nothing is left behind."""

import functools
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sdconvert.adapters import AdapterCapabilities
from sdconvert.adapters.autoencoder_kl import AutoencoderKLAdapter
from sdconvert.adapters.unet_2d_condition import UNet2DConditionModelAdapter
from sdconvert.assets import asset_path
from sdconvert.cli.app import main
from sdconvert.io.tensors import load_tensors, save_tensors, tensor_shapes
from sdconvert.source import source_hash

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass
class Finished:
    """What a command left."""

    returncode: int
    stderr: str
    stdout: str

    @property
    def outcome(self) -> tuple[str, str]:
        """State of the stage, and why."""
        (stage,) = json.loads(self.stdout)["stages"]
        return stage["state"], stage["why"]


Read = Callable[..., Finished]
# The program stays the same here, and a stage's checksum means parsing half of it.
same_source_hash = functools.cache(source_hash)


@pytest.fixture
def read(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Read:
    """Run the command line up to the first stage, in this process: importing diffusers anew takes longer."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr("sdconvert.stages.source_hash", same_source_hash)

    def call(folder: Path, build: Path, *overrides: str) -> Finished:
        command = ["--json", "convert", "--to", "checkpoint", "--build", str(build)]
        with pytest.raises(SystemExit) as left:
            main([*command, *(part for o in (f"checkpoint.path={folder}", *overrides) for part in ("--set", o))])
        written = capsys.readouterr()
        return Finished(int(str(left.value.code)), written.err, written.out)

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(asset_path("pasd_tiny"), tmp_path / "model")
    return tmp_path / "model"


def truncate(folder: Path) -> None:
    path = folder / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def rewrite(config: Path, **changes: object) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def narrow(folder: Path) -> None:
    rewrite(folder / "controlnet" / "config.json", cross_attention_dim=32)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, "no scheduler covers EulerAncestralDiscreteScheduler"),
        ({"clip_sample": True}, "no table of coefficients expresses DDIMScheduler with clip_sample=True"),
    ],
)
def test_a_sampler_that_no_device_can_replay_is_refused_at_once(
    folder: Path, tmp_path: Path, read: Read, change: dict[str, object], message: str
) -> None:
    rewrite(folder / "scheduler" / "scheduler_config.json", **change)
    refused = read(folder, tmp_path / "build")
    assert refused.returncode == 2, refused.stderr
    assert message in refused.stderr
    assert "hint:" in refused.stderr
    assert not list((tmp_path / "build").rglob("10-checkpoint*"))


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


LAYERS = {"unet": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "controlnet": "conv_in"}
TEXT = {"text_encoder": "encoder.layers.0.self_attn.q_proj"}


def write_lora(path: Path, layers: dict[str, str], gain: float = 1.0) -> dict[str, torch.Tensor]:
    """A LoRA of rank 1 on one layer of each of several models; return what it adds, by component."""
    tensors, deltas = {}, {}
    for component, layer in layers.items():
        stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
        shape = tensor_shapes(asset_path("pasd_tiny") / component / f"{stem}.safetensors")[f"{layer}.weight"]
        down, up = torch.full((1, *shape[1:]), 0.1), torch.full((shape[0], 1, *(1,) * len(shape[2:])), gain)
        tensors |= {f"{component}.{layer}.lora_A.weight": down, f"{component}.{layer}.lora_B.weight": up}
        deltas[component] = torch.full(shape, 0.1 * gain)
    save_tensors(tensors, path)
    return deltas


def test_loras_are_fused_before_anything_else(folder: Path, tmp_path: Path, read: Read) -> None:
    files = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    deltas = write_lora(files[0], LAYERS | TEXT)
    write_lora(files[1], LAYERS | TEXT, gain=-1.0)
    loras = f"[{{path: {files[0]}, scale: 2.0}}, {{path: {files[1]}, scale: 0.5}}]"
    assert read(folder, tmp_path / "build", f"checkpoint.loras={loras}").returncode == 0
    stage = tmp_path / "build" / "pasd_tiny" / "10-checkpoint"
    for component, layer in (LAYERS | TEXT).items():
        stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
        before, after = (
            load_tensors(place / component / f"{stem}.safetensors", dtype=torch.float32)
            for place in (folder, stage / "model")
        )
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            change = 1.5 * deltas[component] if name == f"{layer}.weight" else torch.zeros(())
            assert torch.allclose(after[name], tensor + change, atol=1e-6), name
    assert json.loads((stage / "manifest.json").read_text())["metrics"]["lora_layers"] == [3, 3]


def test_a_changed_lora_reruns_the_stage(folder: Path, tmp_path: Path, read: Read) -> None:
    lora, build = tmp_path / "lora.safetensors", tmp_path / "build"
    override = f"checkpoint.loras=[{{path: {lora}}}]"
    write_lora(lora, LAYERS)
    assert read(folder, build, override).outcome == ("ran", "no result yet")
    assert read(folder, build, override).outcome[0] == "reused"
    write_lora(lora, LAYERS, gain=2.0)
    assert read(folder, build, override).outcome == ("ran", "input changed: loras/0")
    state, why = read(folder, build, f"checkpoint.loras=[{{path: {lora}, scale: 2.0}}]").outcome
    assert state == "ran"
    assert "checkpoint.loras" in why
    assert "checkpoint.loras" in read(folder, build).outcome[1]


@pytest.mark.parametrize(
    ("layers", "scale", "message"),
    [
        ({"unet": "mid_block.attentions.9.proj_in"}, 1.0, "2 for no layer of unet"),
        (None, 1.0, "does not exist"),
        (LAYERS, 0.0, "a scale of 0"),
    ],
)
def test_a_lora_that_lands_nowhere_is_refused(
    folder: Path, tmp_path: Path, read: Read, layers: dict[str, str] | None, scale: float, message: str
) -> None:
    lora = tmp_path / "lora.safetensors"
    if layers == LAYERS:
        write_lora(lora, layers)
    elif layers:
        save_tensors(
            {f"unet.{layers['unet']}.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"},
            lora,
        )
    refused = read(folder, tmp_path / "build", f"checkpoint.loras=[{{path: {lora}, scale: {scale}}}]")
    assert refused.returncode == 2
    assert message in refused.stderr
    assert not list((tmp_path / "build").rglob("10-checkpoint*"))


def test_x8_requests_that_the_families_cannot_meet_are_refused_at_once(
    folder: Path, tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoencoderKLAdapter, "capabilities", AdapterCapabilities(quantize=True))
    monkeypatch.setattr(UNet2DConditionModelAdapter, "capabilities", AdapterCapabilities())
    refused = read(folder, tmp_path / "build", "quantize.adaround=true")
    assert refused.returncode == 2
    assert "4 requests cannot be met" in refused.stderr
    for violation in ("unet (UNet2DConditionModel): mha2sha", "vae (AutoencoderKL): adaround"):
        assert violation in refused.stderr
    assert not list((tmp_path / "build").rglob("10-checkpoint*"))
    assert read(folder, tmp_path / "build").returncode == 2  # without AdaRound, three are left
