"""The whole road on the embedded model, and every command that README and docs show.

The run lies in the build folder of the checkout: after `make convert` all of it is reused, on a bare clone it is made.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sdconvert.android.artifact import AndroidArtifact
from sdconvert.android.verify import verify_bundle
from sdconvert.cli.app import main
from sdconvert.config import load_recipe
from sdconvert.io.encodings import read_encodings

ROOT = Path(__file__).parents[1]
RUN = ROOT / "build" / "pasd_tiny"
GRAPHS = ("text_encoder", "vae_encoder", "controlnet", "unet", "vae_decoder")
SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def sdconvert(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "sdconvert", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # the other tests use the other cores
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=3000, check=False)


@pytest.fixture(scope="module")
def road() -> dict[str, dict[str, Any]]:
    """The metrics of every stage of an up-to-date run, by stage."""
    done = sdconvert("--json", "convert")
    assert done.returncode == 0, done.stderr
    return {stage["stage"]: stage["metrics"] for stage in json.loads(done.stdout)["stages"]}


def test_a_second_run_reuses_every_stage_and_says_so(road: dict[str, Any]) -> None:
    done = sdconvert("--json", "convert")
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout)["stages"]
    assert len(stages) == 8
    assert [stage["state"] for stage in stages] == ["reused"] * 8
    assert {stage["why"] for stage in stages} == {"nothing changed"}


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_step_kept_the_graph(road: dict[str, Any], graph: str) -> None:
    gates = load_recipe("pasd_tiny").gates
    assert road["60-qnn"][f"{graph}_SM8650_simulator_vs_fp32_db"] >= gates.simulator_vs_fp32_db >= 35
    assert road["60-qnn"][f"{graph}_SM8650_simulator_vs_quantized_db"] >= gates.simulator_vs_quantized_db >= 45
    assert road["50-export"][f"{graph}_onnx_vs_simulation_db"] >= 60
    assert road["30-quantize"][f"{graph}_simulation_vs_fp32_db"] >= 35


def test_attention_per_head_is_the_same_function(road: dict[str, Any]) -> None:
    for graph in GRAPHS:
        assert road["40-mha2sha"][f"{graph}_fp32_relative_error"] <= 1e-5
        assert road["40-mha2sha"][f"{graph}_worst_layer_fp32_relative_error"] <= 1e-4
        assert float(road["40-mha2sha"][f"{graph}_quantized_sha_vs_mha_db"]) >= 60


def test_the_quantized_pictures_are_the_fp32_pictures(road: dict[str, Any]) -> None:
    for picture in ("chelsea", "china"):
        assert road["30-quantize"][f"{picture}_quantized_vs_fp32_psnr_db"] >= 38


@pytest.mark.parametrize("kind", ["text", "control"])
def test_the_noise_answers_to_prompt_and_control_image_as_in_fp32(road: dict[str, Any], kind: str) -> None:
    tolerance = load_recipe("pasd_tiny").gates.response_tolerance
    assert abs(road["60-qnn"][f"{kind}_response_ratio"] - 1) <= tolerance <= 0.05


def test_no_node_is_left_on_the_cpu(road: dict[str, Any]) -> None:
    assert road["60-qnn"]["cpu_nodes"] == 0


def test_rewrites_leave_a_quarter_of_the_moves(road: dict[str, Any]) -> None:
    """The same UNet compiled in MHA form has 185 Transposes and 472 Reshapes (SM8650, QAIRT 2.51)."""
    nodes = json.loads((RUN / "60-qnn" / "SM8650" / "unet.nodes.json").read_text())
    assert nodes["Transpose"] + nodes["Reshape"] <= 0.25 * (185 + 472)


def test_the_bundle_verifies_and_a_flipped_byte_does_not(road: dict[str, Any], tmp_path: Path) -> None:
    artifact = AndroidArtifact(RUN / "70-android")
    manifest = verify_bundle(artifact.tar)
    assert {graph.name for graph in manifest.graphs} == set(GRAPHS)
    copy = tmp_path / "bundle"
    shutil.copytree(artifact.bundle, copy)
    binary = copy / manifest.graphs[0].context
    content = bytearray(binary.read_bytes())
    content[len(content) // 2] ^= 1
    binary.write_bytes(content)
    with pytest.raises(Exception, match=binary.name):
        verify_bundle(copy)


@pytest.mark.slow
def test_pictures_drawn_behind_adb_are_the_simulators_bit_for_bit(road: dict[str, Any]) -> None:
    command = [sys.executable, "scripts/bench_sim.py", str(RUN / "70-android" / "bundle")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/android'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr
    assert "picture chelsea-tile, picture china-tile, step 0" in done.stdout


@pytest.mark.parametrize(("form", "stage"), [("mha", "30-quantize"), ("sha", "40-mha2sha")])
@pytest.mark.parametrize("graph", GRAPHS)
def test_the_shipped_encodings_are_those_of_a_run(road: dict[str, Any], graph: str, form: str, stage: str) -> None:
    shipped = ROOT / "encodings" / "pasd_tiny" / f"{graph}_{form}.encodings"
    ours, fresh = read_encodings(shipped), read_encodings(RUN / stage / graph / f"{graph}.encodings")
    assert ours["param_encodings"] == fresh["param_encodings"]
    for section in ("activation_encodings", "functional_encodings"):
        flat, anew = _scales(ours[section]), _scales(fresh[section])
        assert flat.keys() == anew.keys()
        # Another processor sums in another order: ranges agree, but not to the last bit.
        assert all(flat[key] == pytest.approx(anew[key], rel=0.02, abs=1e-9) for key in flat)


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the command line in this process, where torch and diffusers are imported already; what it prints."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        written = capsys.readouterr()
        assert left.value.code == 0, written.err
        return written.out

    return run


def test_a_stage_is_redone_only_for_what_it_depends_on(here: Callable[..., str], tmp_path: Path) -> None:
    command = ("--json", "convert", "--to", "checkpoint", "--build", str(tmp_path))
    states = [json.loads(here(*command, *more))["stages"][0]["state"] for more in ((), ("--soc", "SM8550"))]
    assert states == ["ran", "reused"]


def test_an_unknown_soc_is_refused_before_any_work(tmp_path: Path) -> None:
    done = sdconvert("convert", "--soc", "SM8560", "--build", str(tmp_path))
    assert done.returncode == 2
    assert "SM8560" in done.stderr
    assert "SM8550" in done.stderr
    assert not list(tmp_path.rglob("manifest.json"))


def blocks() -> Iterator[Any]:
    """Every shell block in README and docs that does not begin another one; AdaRound takes minutes."""
    pages = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    found = [(page, block) for page in pages for block in SHELL.findall(page.read_text(encoding="utf-8"))]
    for page, block in found:
        if not any(other.startswith(block) and other != block for _, other in found):
            yield pytest.param(block, marks=[pytest.mark.slow] if page.name == "adaround.md" else [])


@pytest.mark.parametrize("block", list(blocks()))
def test_documented_commands_run(
    road: dict[str, Any], here: Callable[..., str], block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, in a folder that looks like a checkout after `make convert`.

    `make` itself runs with `--dry-run`: CI's main job is `make convert` in earnest. What needs torch runs in this
    process, by the command line's own `main`.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    shutil.copytree(RUN, tmp_path / "build" / "pasd_tiny", symlinks=True)
    for command in block.splitlines():
        program, *arguments = shlex.split(command)
        if program == "xdg-open":
            assert (tmp_path / arguments[0]).is_file()
            continue
        if program == ".venv/bin/sdconvert" and (arguments[0] == "pipeline" or "--samples" in arguments):
            here(*arguments)
            continue
        line = f"make --dry-run {shlex.join(arguments)}" if program == "make" else command
        done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr


def _scales(section: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in section.items():
        path = f"{prefix}/{key}"
        flat |= {path: value["scale"]} if "scale" in value else _scales(value, path)
    return flat
