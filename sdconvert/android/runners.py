"""Who runs a bundle's graphs: Qualcomm's runner on a phone, or the simulator here, behind one interface."""

import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from sdconvert.android.adb import Adb
from sdconvert.android.climate import COMMANDS, Climate, parse_climate
from sdconvert.android.device import Phone
from sdconvert.android.device_loop import PhoneExecutor
from sdconvert.android.device_run import RunStatus, pull_results, run_bundle, run_script
from sdconvert.android.executors import Executor, SimulatorExecutor
from sdconvert.android.manifest import GraphRecord, Manifest
from sdconvert.android.profile import EXECUTE, Profile
from sdconvert.android.push import LocalFile, device_files, push
from sdconvert.android.scores import read_raw
from sdconvert.android.timing import Timing
from sdconvert.errors import DeviceError, EnvironmentProblem

Graph = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
Answers = dict[str, dict[str, torch.Tensor]]
_VIEWER_S = 120
_ASK_S = 20.0
_PROFILED = 5
_SLOWEST_S = 10
"""No inference takes longer; the slowest published is 6.3 s, SD1.5's VAE decoder on QCM6690."""


class Runner(Protocol):
    """Runs the graphs of a bundle: all samples for the answers, then one graph at a time for its time."""

    name: str
    soc: str
    """The SoC of the bundle whose contexts it runs."""
    clock: str
    """What its times are."""
    is_device: bool
    """Whether the times are those of a device."""

    def answers(self, bundle: Path, manifest: Manifest) -> dict[str, Answers]:
        """Run every graph of a verified bundle once over its samples; outputs by graph, sample and name."""

    def timing(self, bundle: Path, manifest: Manifest, graph: GraphRecord, inferences: int) -> Timing:
        """Run a graph again and again on its first sample; after `answers`."""

    def climate(self) -> Climate:
        """Ask how warm the device is; empty where there is none to ask."""

    def about(self) -> tuple[dict[str, Any] | None, list[str]]:
        """Return what the device says of itself, nothing where there is none, and notes for whoever reads the times."""

    def executor(self, bundle: Path, manifest: Manifest) -> Executor:
        """Return who answers the calls of a sampling loop; after `answers`."""


@dataclass
class SimulatorRunner:
    """The contexts that ship, in Qualcomm's simulator on this computer.

    Args:
        soc: The SoC of the bundle whose contexts are run.
        load: Opens an EPContext model.
    """

    soc: str
    load: Callable[[Path], Graph]
    name: str = "sim"
    clock: str = "simulator"
    is_device: bool = False

    def answers(self, bundle: Path, manifest: Manifest) -> dict[str, Answers]:
        """See `Runner`."""
        found = {}
        for graph in graphs_of(manifest, self.soc):
            context = self.load(bundle / graph.epcontext)
            samples = [sample.id for sample in manifest.samples if sample.graph == graph.name]
            found[graph.name] = {sample: context(_inputs(bundle, graph, sample)) for sample in samples}
        return found

    def timing(self, bundle: Path, manifest: Manifest, graph: GraphRecord, inferences: int) -> Timing:
        """See `Runner`."""
        sample = next(sample.id for sample in manifest.samples if sample.graph == graph.name)
        inputs = _inputs(bundle, graph, sample)
        begin = time.perf_counter()
        context = self.load(bundle / graph.epcontext)
        load_ms = (time.perf_counter() - begin) * 1e3
        times = [_milliseconds(context, inputs) for _ in range(inferences)]
        return Timing(times, first_ms=times[0], load_ms=load_ms)

    def climate(self) -> Climate:
        """See `Runner`."""
        return Climate()

    def about(self) -> tuple[dict[str, Any] | None, list[str]]:
        """See `Runner`."""
        return None, ["times are the simulator's on this computer, no figure of a device"]

    def executor(self, bundle: Path, manifest: Manifest) -> Executor:
        """See `Runner`."""
        return SimulatorExecutor(graphs_of(manifest, self.soc), bundle, self.load)


@dataclass
class PhoneRunner:
    """`qnn-net-run` on an Android phone.

    Args:
        adb: The phone's client.
        phone: What it says of itself.
        soc: The SoC of the bundle that it runs.
        files: Runner and libraries, by path beside the bundle.
        viewer: `qnn-profile-viewer` of the same SDK, for this computer.
        remote: Folder on the phone.
        limit_s: Seconds after which a runner counts as hung.
        warm_up: Inferences before those that count; the first ones power the DSP up.
    """

    adb: Adb
    phone: Phone
    soc: str
    files: Mapping[str, LocalFile]
    viewer: Path | None
    remote: str
    limit_s: int = 600
    warm_up: int = 10
    name: str = "qnn-net-run"
    clock: str = "QNN execute"
    is_device: bool = True

    def answers(self, bundle: Path, manifest: Manifest) -> dict[str, Answers]:
        """See `Runner`; pushes the bundle first.

        Raises:
            DeviceError: The phone did not do what was asked.
        """
        push(self.adb, {**device_files(bundle, manifest, self.soc), **run_script(), **self.files}, self.remote)
        status = run_bundle(
            self.adb, manifest, self.soc, self.remote, ("check", "env", "accuracy"), limit_s=self.limit_s
        )
        with self._pulled(status) as results:
            return {
                graph.name: _answers(results / "accuracy" / graph.name, manifest, graph)
                for graph in graphs_of(manifest, self.soc)
            }

    def timing(self, bundle: Path, manifest: Manifest, graph: GraphRecord, inferences: int) -> Timing:
        """See `Runner`.

        Raises:
            DeviceError: The phone did not do what was asked.
            EnvironmentProblem: A profile is binary, and no viewer converts it.
        """
        count = inferences + self.warm_up
        limit_s = max(self.limit_s, _SLOWEST_S * count)
        with self._run(manifest, graph, f"latency={count}", limit_s) as (folder, step):
            profile = Profile(self._profile(folder / "qnn-profiling-data_0.log"))
            timing = _timing(folder, profile, step)
        times = timing.times_ms[self.warm_up :]
        if len(times) != inferences:
            raise DeviceError(
                f"the profile of graph `{graph.name}` has {len(times)} times, not {inferences}",
                hint="is the profile viewer of the same SDK as the runner?",
            )
        return replace(timing, times_ms=times, npu_ms=timing.npu_ms[self.warm_up :])

    def op_profile(self, manifest: Manifest, graph: GraphRecord) -> dict[str, Any]:
        """Return the cycles of a graph's ops, of a run of its own that is slower than those which are timed.

        Raises:
            DeviceError: The phone did not do what was asked, or the profile has no ops.
        """
        with self._run(manifest, graph, f"profile={_PROFILED}", self.limit_s) as (folder, _):
            return Profile(self._profile(folder / "qnn-profiling-data_0.log")).ops()

    def sustain(self, manifest: Manifest, graph: GraphRecord, seconds: int) -> Timing:
        """Run a graph without a pause in the mode for long work; every inference counts.

        Raises:
            DeviceError: The phone did not do what was asked.
        """
        with self._run(manifest, graph, f"sustained={seconds}", self.limit_s + seconds) as (folder, step):
            return _timing(folder, Profile(self._profile(folder / "qnn-profiling-data_0.log")), step)

    def climate(self) -> Climate:
        """See `Runner`."""
        return parse_climate(self.adb.shell(COMMANDS, timeout_s=_ASK_S, doing="its temperature was asked for").out)

    def about(self) -> tuple[dict[str, Any] | None, list[str]]:
        """See `Runner`."""
        device = {key: value for key, value in vars(self.phone).items() if key != "soc"}
        return {**device, "soc": self.phone.soc.name}, list(self.phone.notes)

    def executor(self, bundle: Path, manifest: Manifest) -> Executor:
        """See `Runner`."""

        def times_ms(log: Path) -> list[float]:
            return Profile(self._profile(log)).times_ms(EXECUTE)

        return PhoneExecutor(self.adb, graphs_of(manifest, self.soc), self.remote, self.limit_s, times_ms)

    @contextmanager
    def _run(
        self, manifest: Manifest, graph: GraphRecord, step: str, limit_s: int
    ) -> Iterator[tuple[Path, dict[str, str]]]:
        """Take one graph through one step; gives the folder of its results and what the status says of it."""
        status = run_bundle(self.adb, manifest, self.soc, self.remote, ("env", step), limit_s=limit_s, only=graph.name)
        name = step.partition("=")[0]
        with self._pulled(status) as results:
            yield results / name / graph.name, status.step(name, graph.name)

    @contextmanager
    def _pulled(self, status: RunStatus) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="sdconvert-") as scratch:
            results = Path(scratch) / "results"
            pull_results(self.adb, self.remote, status, results)
            yield results

    def _profile(self, log: Path) -> Path:
        """Return the profile as CSV; the runner writes it in a form of its own."""
        if log.read_bytes().startswith(b"Msg Timestamp"):
            return log
        if not self.viewer:
            raise EnvironmentProblem(f"`{log.name}` is binary", hint="give the SDK, which has qnn-profile-viewer")
        out = log.with_suffix(".csv")
        command = [str(self.viewer), "--input_log", str(log), "--output", str(out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_VIEWER_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EnvironmentProblem(f"`{self.viewer}` cannot be run: {error}", hint="check the SDK") from error
        if not out.is_file():
            said = (done.stderr or done.stdout).strip()
            raise EnvironmentProblem(f"`{self.viewer}` made no CSV: {said}", hint="use the SDK of the runner")
        return out


def graphs_of(manifest: Manifest, soc: str) -> list[GraphRecord]:
    """Return the graphs of one SoC."""
    return [graph for graph in manifest.graphs if graph.soc == soc]


def _inputs(bundle: Path, graph: GraphRecord, sample: str) -> dict[str, torch.Tensor]:
    folder = bundle / "inputs" / sample
    return {tensor.name: read_raw(folder / f"{tensor.name}.raw", tensor.dtype, tensor.shape) for tensor in graph.inputs}


def _milliseconds(context: Graph, inputs: Mapping[str, torch.Tensor]) -> float:
    begin = time.perf_counter()
    context(inputs)
    return (time.perf_counter() - begin) * 1e3


def _timing(folder: Path, profile: Profile, step: Mapping[str, str]) -> Timing:
    times, npu = profile.times_ms(EXECUTE), profile.npu_ms()
    text = (folder / "climate").read_text(encoding="utf-8", errors="replace")
    before, after = (parse_climate(part) for part in re.split(r"^sdconvert-climate \w+$", text, flags=re.M)[1:])
    return Timing(
        times,
        first_ms=times[0],
        load_ms=profile.load_ms(),
        climates=((before, after),),
        counters=profile.counters(),
        peak_kb=int(step["peak_kb"]),
        npu_ms=npu if len(npu) == len(times) else [],
    )


def _answers(folder: Path, manifest: Manifest, graph: GraphRecord) -> Answers:
    samples = [sample.id for sample in manifest.samples if sample.graph == graph.name]
    # qnn-net-run writes float32 whatever the graph's own type is.
    return {
        sample: {
            output.name: read_raw(folder / f"Result_{index}" / f"{output.name}.raw", "float32", output.shape)
            for output in graph.outputs
        }
        for index, sample in enumerate(samples)
    }
