"""A Linux board: here everything but the NPU, which no computer of the tests has."""

import json
import platform
from pathlib import Path

import pytest

from sdconvert.android.bench import bench
from sdconvert.android.board import BoardRunner, board_soc, choose_board_soc
from sdconvert.android.climate import Climate
from sdconvert.android.measure import Job
from sdconvert.android.timing import Plan
from sdconvert.android.verify import verify_bundle
from sdconvert.cli.app import main
from sdconvert.errors import DeviceError, EnvironmentProblem, UsageError
from sdconvert.qnn.npu import require_npu
from sdconvert.qnn.simulator import Simulator


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """What a board's kernel tells, as its documentation has it."""
    root = tmp_path / "sys"
    for name, value in {
        "devices/soc0/machine": "SM8650\n",
        "firmware/devicetree/base/model": "Some board\0",
        "class/thermal/thermal_zone0/type": "cpu0-thermal\n",
        "class/thermal/thermal_zone0/temp": "80000\n",
        "class/thermal/thermal_zone7/type": "nsp0-thermal\n",
        "class/thermal/thermal_zone7/temp": "41500\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(value)
    return root


def test_a_computer_without_an_npu_is_told_so(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^3$"):
        main(["--json", "bench", str(bundle), "--runner", "ort"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert f"this computer is {platform.machine()} and has no Hexagon NPU" in error["message"]
    assert "--runner sim" in error["hint"]


def test_a_board_without_its_driver_is_told_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # ONNX Runtime is asked for real, and finds none; only the name of the machine is another.
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(EnvironmentProblem, match=r"missing: a device .*/fastrpc-cdsp and the library libcdsprpc\.so"):
        require_npu(tmp_path)
    (tmp_path / "fastrpc-cdsp-secure").touch()
    with pytest.raises(EnvironmentProblem, match=r"missing: the library libcdsprpc\.so") as caught:
        require_npu(tmp_path)
    assert caught.value.exit_code == 3


def test_what_the_kernel_says_of_the_board(bundle: Path, system: Path, tmp_path: Path) -> None:
    runner = BoardRunner("SM8650", Simulator, warm_up=2, system=system)
    assert runner.climate() == Climate(None, {"nsp0-thermal": 41.5})
    assert runner.about() == ({"model": "Some board", "soc": "SM8650"}, [])
    manifest = verify_bundle(bundle)
    assert choose_board_soc(manifest, system) == "SM8650"
    # The session is the simulator's, so that the course of a bench on a board can be seen here.
    [result] = bench([Job(bundle, manifest, runner)], [tmp_path / "out"], Plan(inferences=3))
    [graph] = result["graphs"]
    assert graph["outputs"]["out_sample"]["vs_simulator"]["bit_equal"]
    assert graph["latency"]["ONNX Runtime run"]["n"] == 3
    assert (result["runner"], len(graph["climate"])) == ("ort", 1)


@pytest.mark.parametrize("machine", ["", "BCM2712\n"])
def test_a_board_that_is_not_known(system: Path, machine: str) -> None:
    (system / "devices/soc0/machine").write_text(machine)
    with pytest.raises(DeviceError, match="does not say that it has an NPU that sdconvert knows") as caught:
        board_soc(system)
    assert caught.value.exit_code == 7


def test_a_bundle_for_another_board(bundle: Path, system: Path) -> None:
    (system / "devices/soc0/machine").write_text("QCS6490\n")
    with pytest.raises(UsageError, match="the bundle is for SM8650, SM8550; this board has QCS6490"):
        choose_board_soc(verify_bundle(bundle), system)
