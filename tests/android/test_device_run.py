"""A pushed bundle is run on the phone by `run.sh`; only a complete status file is believed."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from adb_rig import Rig, until
from phone import Phone
from quick_runner import QUICK, SHORT_ANSWERS

from sdconvert.android.adb import Adb
from sdconvert.android.device_run import RunStatus, pull_results, run_bundle, run_script
from sdconvert.android.manifest import Manifest
from sdconvert.android.push import PushReport, device_files, local_file, push
from sdconvert.errors import (
    DeviceError,
    DeviceFullError,
    DeviceLostError,
    DeviceTimeoutError,
    EnvironmentProblem,
    UsageError,
)

REMOTE = "/data/local/tmp/sdconvert"
STEPS = ("check", "env", "accuracy", "latency=3")
SHAPE = (1, 3, 8, 8)


class Bench:
    """One phone with the bundle, and a runner that a test chooses."""

    def __init__(self, rig: Rig, phone: Phone, bundle: Path, scratch: Path) -> None:
        self.rig, self.phone, self.bundle = rig, phone, bundle
        self.manifest = Manifest.model_validate_json((bundle / "manifest.json").read_bytes())
        self._runner = scratch / "qnn-net-run"
        self.runner(QUICK)

    @property
    def adb(self) -> Adb:
        return Adb(self.rig.binary, self.phone.daemon.serial)

    def runner(self, script: str, version: str = "echo QNN SDK v2.51.0; exit 0") -> None:
        shell = self.phone.path("/system/bin/sh")
        self._runner.write_text(f'#!{shell}\n[ "$1" != --version ] || {{ {version}; }}\n{script}\n')

    def push(self) -> PushReport:
        files = device_files(self.bundle, self.manifest, "SM8650") | run_script()
        return push(self.adb, {**files, "bin/qnn-net-run": local_file(self._runner)}, REMOTE)

    def run(self, limit_s: int = 60, steps: tuple[str, ...] = STEPS) -> RunStatus:
        return run_bundle(self.adb, self.manifest, "SM8650", REMOTE, steps, limit_s=limit_s)

    def push_and_run(self) -> RunStatus:
        self.push()
        return self.run()

    def status(self) -> list[str]:
        return self.phone.path(f"{REMOTE}/out/status").read_text().splitlines()


@pytest.fixture
def bench(rig: Rig, bundle: Path, tmp_path: Path) -> Bench:
    return Bench(rig, rig.phone(), bundle, tmp_path)


def test_the_simulator_behind_adb_answers_as_recorded_when_packaged(bench: Bench, tmp_path: Path) -> None:
    bench.phone.stand_in_runner(tmp_path)
    bench.push()
    # A phone needs the context alone.
    epcontext = bench.bundle / "models/SM8650/gate.ctx.onnx"
    shutil.copy(epcontext, bench.phone.path(f"{REMOTE}/bundle/models/SM8650"))
    status = bench.run()
    pull_results(bench.adb, REMOTE, status, tmp_path / "results")
    for index, name in enumerate(("gate-chelsea", "gate-china")):
        answer = (tmp_path / f"results/accuracy/gate/Result_{index}/out_sample.raw").read_bytes()
        assert answer == (bench.bundle / f"expected/{name}/out_sample.sim.SM8650.raw").read_bytes()
        assert np.frombuffer(answer, "<f4").reshape(SHAPE).any()
    profile = (tmp_path / "results/latency/gate/qnn-profiling-data_0.log").read_text()
    assert profile.count("QNN (execute) time") == 3
    assert int(status.step("latency", "gate")["peak_kb"]) > 10_000


def test_the_status_counts_and_sizes_what_a_run_left(bench: Bench, tmp_path: Path) -> None:
    status = bench.push_and_run()
    steps = [(step.name, step.figures.get("graph")) for step in status.steps]
    assert steps == [("check", None), ("env", None), ("accuracy", "gate"), ("latency", "gate")]
    assert status.steps[0].figures == {"files": "9"}
    found = status.step("accuracy", "gate")
    assert {key: found[key] for key in ("results", "files", "bytes")} == {"results": "2", "files": "2", "bytes": "1536"}
    assert bench.status()[-1] == "done"
    assert bench.run().text != status.text


def test_a_flipped_byte_on_the_phone_stops_the_run_and_the_next_push_repairs_it(bench: Bench) -> None:
    bench.push()
    context = bench.phone.path(f"{REMOTE}/bundle/models/SM8650/gate_qnn.bin")
    content = bytearray(context.read_bytes())
    content[len(content) // 2] ^= 1
    context.write_bytes(content)
    with pytest.raises(DeviceError, match=r"`models/SM8650/gate_qnn\.bin` on device .* is damaged") as caught:
        bench.run()
    assert (caught.value.exit_code, "sent again" in caught.value.hint) == (7, True)
    assert not bench.phone.path(f"{REMOTE}/out/accuracy").exists()
    bench.push_and_run()


def test_a_hung_runner_is_ended(bench: Bench) -> None:
    bench.runner("exec sleep 1000")
    bench.push()
    with pytest.raises(DeviceTimeoutError, match="hung on device .* in step `accuracy` and was ended after 1 s"):
        bench.run(limit_s=1)
    assert bench.status()[-1] == "fail accuracy hung 1"
    until(lambda: not bench.phone.running())
    bench.runner(QUICK)
    bench.push_and_run()


# Sleeps for ever in the step that a test has written down, and else answers at once.
SLEEPER = """
case "$(cat "$RIG/hang") $*" in
  accuracy* | latency*--profiling_level*) exec sleep 1000 ;;
esac
"""


@pytest.mark.parametrize("step", ["check", "env", "accuracy", "latency"])
def test_a_cable_pulled_in_a_run_ends_it_there_too(bench: Bench, step: str) -> None:
    bench.runner(SLEEPER + QUICK, version='case $(cat "$RIG/hang") in env | check) exec sleep 1000 ;; esac; exit 0')
    bench.push()
    bench.phone.prints("hang", step)
    bench.phone.trap("output", f"begin {step}", bench.phone.unplug)
    with pytest.raises(DeviceLostError, match="broke while the graphs were run") as caught:
        bench.run()
    assert caught.value.exit_code == 7
    until(lambda: not bench.phone.running())
    assert bench.status()[-1].endswith("hangup")
    bench.phone.prints("hang", "never")
    bench.rig.replug(bench.phone)
    assert bench.push().sent_files == 0
    bench.run()


def test_a_killed_server_ends_the_run(bench: Bench) -> None:
    bench.runner(QUICK.replace("i=0", "i=0; sleep 0.5"))
    bench.push()
    bench.phone.trap("output", "begin accuracy", bench.rig.kill_server)
    with pytest.raises(DeviceLostError):
        bench.run()
    until(lambda: not bench.phone.running())
    bench.rig.connect(bench.phone)
    bench.run()


def test_a_run_that_android_kills_is_told_as_such(bench: Bench) -> None:
    bench.runner("kill -9 $PPID; sleep 0.2")
    with pytest.raises(DeviceLostError, match="was killed after `begin accuracy graph=gate`") as caught:
        bench.push_and_run()
    assert "memory is short" in caught.value.hint


@pytest.mark.parametrize(
    ("script", "version", "message", "hint"),
    [
        ("", "echo 'CANNOT LINK EXECUTABLE: library libQnnHtp.so not found'; exit 1", "`env` .exit code 1", "missing"),
        ("", "exit 127", "`env` .exit code 127.*ends with `nothing`", "whole log is"),
        ("echo 'Could not create context from binary, err 5000'; exit 1", "exit 0", "`accuracy`", "older than"),
        ("echo qnn_open failed, 0x80000406 >&2; exit 3", "exit 0", "exit code 3", "Skel"),
        ("kill -9 $$", "exit 0", "exit code 137", "whole log is"),
    ],
)
def test_a_runner_that_fails_is_explained(bench: Bench, script: str, version: str, message: str, hint: str) -> None:
    bench.runner(script, version)
    with pytest.raises(DeviceError, match=message) as caught:
        bench.push_and_run()
    assert (caught.value.exit_code, hint in caught.value.hint) == (7, True)


def test_a_phone_without_a_runner(bench: Bench) -> None:
    push(bench.adb, device_files(bench.bundle, bench.manifest, "SM8650") | run_script(), REMOTE)
    with pytest.raises(DeviceError, match=r"has no runner `\./bin/qnn-net-run`") as caught:
        bench.run()
    assert "QAIRT SDK" in caught.value.hint


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        *SHORT_ANSWERS,
        ("echo profile >", ": >", "wrote no profile of graph `gate`"),
    ],
)
def test_answers_that_are_not_whole_are_refused(bench: Bench, old: str, new: str, message: str) -> None:
    bench.runner(QUICK.replace(old, new))
    with pytest.raises(DeviceError, match=message):
        bench.push_and_run()


def test_a_phone_that_fills_up_in_a_run(bench: Bench, small_disk: Path) -> None:
    storage = bench.phone.path("/data/local/tmp")
    storage.rmdir()
    storage.symlink_to(small_disk)
    bench.push()
    (small_disk / "filler").write_bytes(bytes(free_on(small_disk) - 8192))
    with pytest.raises(DeviceFullError, match="could not write below .*/out|has no room"):
        bench.run()
    (small_disk / "filler").unlink()
    bench.run(steps=STEPS[:3])


def free_on(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


@pytest.mark.parametrize("when", ["accuracy", "status"])
def test_a_cable_pulled_while_results_come_leaves_no_results(bench: Bench, tmp_path: Path, when: str) -> None:
    status = bench.push_and_run()
    bench.phone.trap("recv", when, bench.phone.unplug)
    with pytest.raises(DeviceLostError, match="while results were fetched"):
        pull_results(bench.adb, REMOTE, status, tmp_path / "here/results")
    assert list((tmp_path / "here").iterdir()) == []
    bench.rig.replug(bench.phone)
    pull_results(bench.adb, REMOTE, status, tmp_path / "here/results")


def test_a_full_disk_here_leaves_no_results(bench: Bench, small_disk: Path) -> None:
    status = bench.push_and_run()
    bench.phone.path(f"{REMOTE}/out/accuracy/gate/extra").write_bytes(bytes(200_000))
    with pytest.raises(EnvironmentProblem, match="no space left"):
        pull_results(bench.adb, REMOTE, status, small_disk / "results")
    assert list(small_disk.iterdir()) == []


def test_results_of_another_run_are_refused(bench: Bench, tmp_path: Path) -> None:
    status = bench.push_and_run()
    (bench.phone.path(f"{REMOTE}/out/accuracy/gate/Result_1/out_sample.raw")).unlink()
    with pytest.raises(DeviceError, match="of graph `gate` 1 files with 768 bytes came"):
        pull_results(bench.adb, REMOTE, status, tmp_path / "results")
    bench.run()
    with pytest.raises(DeviceError, match="are of another run"):
        pull_results(bench.adb, REMOTE, status, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def with_dtypes(manifest: Manifest, *dtypes: str) -> Manifest:
    """Return the manifest with other types for the inputs of its graphs."""
    changed = [
        graph.model_copy(
            update={
                "inputs": tuple(
                    tensor.model_copy(update={"dtype": dtype})
                    for tensor, dtype in zip(graph.inputs, dtypes, strict=True)
                )
            }
        )
        for graph in manifest.graphs
    ]
    return manifest.model_copy(update={"graphs": tuple(changed)})


def test_token_ids_are_not_read_as_numbers(bench: Bench) -> None:
    bench.runner(f'echo "$@"\n{QUICK}')
    bench.push_and_run()
    log = bench.phone.path(f"{REMOTE}/out/accuracy-gate.log")
    assert "--use_native_input_files" not in log.read_text()
    bench.manifest = with_dtypes(bench.manifest, "int32", "int32")
    bench.run()
    assert "--log_level warn --use_native_input_files" in log.read_text()
    bench.manifest = with_dtypes(bench.manifest, "int32", "float32")
    with pytest.raises(UsageError, match="graph `gate` has inputs of types float32, int32"):
        bench.run()
