"""Calls of a loop on a phone: what stays there, what is sent once, and what goes wrong on the way."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from adb_rig import Rig, until
from bundle_request import GATE, BundleRequest
from phone import Phone
from quick_runner import QUICK, SHORT_ANSWERS
from torch import Tensor

from sdconvert.android.adb import Adb
from sdconvert.android.bundle import Sample
from sdconvert.android.device_loop import PhoneExecutor
from sdconvert.android.device_run import run_script
from sdconvert.android.executors import ChainExecutor
from sdconvert.android.manifest import ChainRecord, Manifest
from sdconvert.android.profile import EXECUTE, Profile
from sdconvert.android.push import PushReport, device_files, local_file, push
from sdconvert.errors import DeviceError, DeviceFullError, DeviceLostError, DeviceTimeoutError, UsageError
from sdconvert.qnn.context import compile_context
from sdconvert.qnn.simulator import Simulator
from sdconvert.soc import find_soc

REMOTE = "/data/local/tmp/sdconvert"
SHAPE = (1, 3, 8, 8)


class Loop:
    """One phone with two graphs that are called in turn, and a runner that a test chooses."""

    def __init__(self, rig: Rig, phone: Phone, bundle: Path, scratch: Path) -> None:
        self.rig, self.phone, self.bundle = rig, phone, bundle
        self.adb = Adb(rig.binary, phone.daemon.serial)
        self.manifest = Manifest.model_validate_json((bundle / "manifest.json").read_bytes())
        self._runner = scratch / "qnn-net-run"
        self.times: Callable[[Path], list[float]] = lambda log: [1.0, 2.0]

    def runner(self, script: str) -> None:
        shell = self.phone.path("/system/bin/sh")
        self._runner.write_text(f'#!{shell}\n[ "$1" != --version ] || exit 0\n{script}\n')

    def push(self) -> PhoneExecutor:
        self.send()
        return self.executor()

    def send(self) -> PushReport:
        contexts = {graph.epcontext: local_file(self.bundle / graph.epcontext) for graph in self.manifest.graphs}
        files = {**device_files(self.bundle, self.manifest, "SM8650"), **run_script(), **contexts}
        return push(self.adb, {**files, "bin/qnn-net-run": local_file(self._runner)}, REMOTE)

    def goes_through(self) -> None:
        """The same command again: what was sent is there, and a loop of its own begins anew."""
        assert self.send().sent_files == 0
        found = self.executor().execute("gate", [call(0), call(1)], keep=False)
        assert [tuple(answer["out_sample"].shape) for answer in found.outputs] == [SHAPE] * 2

    def executor(self, limit_s: int = 60) -> PhoneExecutor:
        return PhoneExecutor(self.adb, self.manifest.graphs, REMOTE, limit_s, self.times)

    def path(self, name: str) -> Path:
        return self.phone.path(f"{REMOTE}/loop/{name}")


@pytest.fixture(scope="module")
def two_graphs(asked: BundleRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same graph under two names, and one that goes on from its answer as the other part of a model."""
    folder = tmp_path_factory.mktemp("two")
    contexts, samples = [], []
    for graph in ("gate", "second"):
        context, files = asked.contexts[0], folder / graph
        files.mkdir()
        binary, model = files / f"{graph}_qnn.bin", files / f"{graph}.ctx.onnx"
        binary.write_bytes(context.bin.read_bytes())
        # Names in a protobuf have their length before them: the two are as long as each other only by chance.
        model.write_bytes(context.ctx_onnx.read_bytes())
        contexts.append(replace(context, graph=graph, bin=binary, ctx_onnx=model))
        samples += [replace(one, id=f"{graph}-{one.id}", graph=graph, sim={}) for one in asked.samples]
    model = onnx.parser.parse_model(GATE.replace("out_sample", "y").replace("residual", "out_sample"))
    onnx.save(model, folder / "tail.onnx")
    contexts.append(compile_context(folder / "tail.onnx", folder / "tail", find_soc("SM8650")))
    given = dict(zip(("latent", "out_sample"), asked.samples[0].inputs.values(), strict=True))
    samples.append(Sample("tail-0", "tail", given, {"y": asked.samples[0].fp32["out_sample"]}))
    chain = ChainRecord(name="net", parts=("gate", "tail"), outputs=("y",))
    return BundleRequest(contexts, samples).write(folder / "bundle", chains=[chain])


@pytest.fixture
def loop(rig: Rig, two_graphs: Path, tmp_path: Path) -> Loop:
    loop = Loop(rig, rig.phone(), two_graphs, tmp_path)
    loop.runner(QUICK)
    return loop


def call(seed: int, **others: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(SHAPE, generator=generator) for name in ("latent", "residual")} | others


def test_a_chain_on_the_phone_is_the_chain_in_the_simulator(loop: Loop, asked: BundleRequest, tmp_path: Path) -> None:
    loop.phone.stand_in_runner(tmp_path)
    loop.times = lambda log: Profile(log).times_ms(EXECUTE)
    executor = loop.push()
    simulator = Simulator(asked.contexts[0].ctx_onnx)
    calls = [call(0), call(1)]
    held = executor.execute("gate", calls, keep=True)
    assert all(tensors["out_sample"].is_meta for tensors in held.outputs)
    assert [len(held.times_ms), min(held.times_ms) > 0] == [2, True]
    # The second picture's answer goes to the first call: each is found where it lies.
    turned = [one["out_sample"] for one in reversed(held.outputs)]
    behind = [call(index + 2, residual=residual) for index, residual in enumerate(turned)]
    found = executor.execute("second", behind, keep=False)
    for index, answer in enumerate(found.outputs):
        residual = simulator(calls[1 - index])["out_sample"]
        assert torch.equal(answer["out_sample"], simulator(call(index + 2, residual=residual))["out_sample"])
    assert "residual:=../loop/answer/gate/Result_1/out_sample.raw" in loop.path("second.txt").read_text().split("\n")[0]
    # A model in two parts, as a loop asks for it.
    found = ChainExecutor(executor, loop.manifest).execute("net", calls, keep=False)
    tail = Simulator(loop.bundle / "models/SM8650/tail.ctx.onnx")
    for asked_for, answer in zip(calls, found.outputs, strict=True):
        between = simulator(asked_for)["out_sample"]
        assert torch.equal(answer["y"], tail({"latent": asked_for["latent"], "out_sample": between})["y"])
    assert loop.path("tail.txt").read_text().count("out_sample:=../loop/answer/gate/Result_") == 2


def test_what_a_call_needs_is_sent_once_and_checked_each_time(loop: Loop) -> None:
    executor = loop.push()
    executor.execute("gate", [call(0), call(1)], keep=False)
    before = loop.phone.pushed_bytes
    executor.execute("second", [call(0), call(1, latent=call(0)["latent"])], keep=False)
    assert loop.phone.pushed_bytes - before < 2 * 768  # the list and its checksums, and no tensor
    assert loop.path("status").read_text().splitlines()[2] == "check ok files=4"
    sent = next(loop.path("in").iterdir())
    sent.write_bytes(bytes(768))
    with pytest.raises(DeviceError, match=rf"`\.\./loop/in/{sent.name}` on device .* is damaged"):
        executor.execute("gate", [call(0), call(1)], keep=False)
    # Another loop begins anew.
    loop.executor().execute("gate", [call(0), call(1)], keep=False)


def test_an_answer_that_is_gone_is_no_input(loop: Loop) -> None:
    executor = loop.push()
    [held, _] = executor.execute("gate", [call(0), call(1)], keep=True).outputs
    executor.execute("gate", [call(2), call(3)], keep=True)
    with pytest.raises(UsageError, match="`residual` of graph `second` is an answer that is gone"):
        executor.execute("second", [call(0, residual=held["out_sample"])], keep=False)
    with pytest.raises(UsageError, match=r"`latent` of graph `gate` is \[1, 3, 4, 4\], not \[1, 3, 8, 8\]"):
        executor.execute("gate", [call(0, latent=torch.zeros(1, 3, 4, 4))], keep=False)
    with pytest.raises(UsageError, match="graph `gate` is called with latent, residual, more"):
        executor.execute("gate", [call(0, more=torch.zeros(1))], keep=False)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        *SHORT_ANSWERS,
        ("echo profile", "exit 3; echo profile", "failed in step `answer` .exit code 3"),
    ],
)
def test_answers_that_are_not_whole_are_refused(loop: Loop, old: str, new: str, message: str) -> None:
    loop.runner(QUICK.replace(old, new))
    executor = loop.push()
    with pytest.raises(DeviceError, match=message):
        executor.execute("gate", [call(0), call(1)], keep=False)


def test_a_profile_of_other_calls_is_refused(loop: Loop) -> None:
    executor = loop.push()
    with pytest.raises(DeviceError, match="profile of graph `gate` has 2 times, not 1"):
        executor.execute("gate", [call(0)], keep=True)


def test_a_runner_that_hangs_in_a_loop_is_ended(loop: Loop) -> None:
    loop.runner("exec sleep 1000")
    loop.push()
    with pytest.raises(DeviceTimeoutError, match="hung on device .* in step `answer`"):
        loop.executor(limit_s=1).execute("gate", [call(0), call(1)], keep=False)
    until(lambda: not loop.phone.running())


def test_a_loop_that_android_kills_is_told_as_such(loop: Loop) -> None:
    loop.runner("kill -9 $PPID; sleep 0.2")
    executor = loop.push()
    with pytest.raises(DeviceLostError, match="was killed after `begin answer graph=gate`"):
        executor.execute("gate", [call(0), call(1)], keep=False)


def test_a_cable_pulled_in_a_loop_ends_the_runner_there(loop: Loop) -> None:
    loop.runner("exec sleep 1000")
    executor = loop.push()
    loop.phone.trap("output", "begin answer", loop.phone.unplug)
    with pytest.raises(DeviceLostError, match="broke while graph `gate` was run"):
        executor.execute("gate", [call(0), call(1)], keep=False)
    until(lambda: not loop.phone.running())
    assert loop.path("status").read_text().endswith("hangup\n")


PHASES = {
    "its folder": ("shell", "rm -rf .*/loop"),
    "inputs": ("send", "loop/in/"),
    "lists": ("send", r"gate\.txt"),
    "checksums": ("output", "begin loop"),
    "runner": ("output", "check ok"),
    "status": ("shell", "cat .*loop/status"),
    "answers": ("recv", "Result_1"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_cable_pulled_anywhere_in_a_loop_is_told_and_the_next_one_goes_through(loop: Loop, phase: str) -> None:
    executor = loop.push()
    loop.phone.trap(*PHASES[phase], loop.phone.unplug)
    with pytest.raises(DeviceLostError, match="the connection to device .* broke") as caught:
        executor.execute("gate", [call(0), call(1)], keep=False)
    assert (caught.value.exit_code, "the same command again" in caught.value.hint) == (7, True)
    assert not loop.phone.traps
    until(lambda: not loop.phone.running())
    loop.rig.replug(loop.phone)
    loop.goes_through()


def test_a_killed_server_ends_a_loop(loop: Loop) -> None:
    loop.runner(QUICK.replace("i=0", "i=0; sleep 0.5"))
    executor = loop.push()
    loop.phone.trap("output", "begin answer", loop.rig.kill_server)
    with pytest.raises(DeviceLostError, match="broke while graph `gate` was run"):
        executor.execute("gate", [call(0), call(1)], keep=False)
    until(lambda: not loop.phone.running())
    loop.rig.connect(loop.phone)
    loop.goes_through()


def test_a_phone_that_has_no_room_for_a_loops_inputs(loop: Loop) -> None:
    executor = loop.push()
    loop.phone.capacity = 0
    with pytest.raises(DeviceFullError, match="ran out of space while files were sent") as caught:
        executor.execute("gate", [call(0), call(1)], keep=False)
    assert caught.value.exit_code == 7
    loop.phone.capacity = None
    loop.goes_through()


def test_a_phone_that_fills_up_in_a_loop(loop: Loop, small_disk: Path) -> None:
    executor = loop.push()
    executor.execute("gate", [call(0), call(1)], keep=False)
    shutil.copytree(loop.path(""), small_disk, dirs_exist_ok=True)
    shutil.rmtree(loop.path(""))
    loop.path("").symlink_to(small_disk)
    filler = small_disk / "filler"
    loop.phone.trap("shell", r"run\.sh", lambda: filler.write_bytes(bytes(shutil.disk_usage(small_disk).free)))
    with pytest.raises(DeviceFullError, match="could not write below .*/loop after") as caught:
        executor.execute("gate", [call(0), call(1)], keep=False)
    assert (caught.value.exit_code, filler.exists()) == (7, True)
    loop.goes_through()
