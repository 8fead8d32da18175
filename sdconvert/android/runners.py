"""Who runs a bundle's graphs: Qualcomm's runner on a phone, or the simulator here, behind one interface."""

import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from sdconvert.android.adb import Adb
from sdconvert.android.device import Phone
from sdconvert.android.device_loop import PhoneExecutor
from sdconvert.android.device_run import pull_results, run_bundle, run_script
from sdconvert.android.executors import Executor, SimulatorExecutor
from sdconvert.android.manifest import GraphRecord, Manifest
from sdconvert.android.push import LocalFile, device_files, push
from sdconvert.android.scores import read_profile, read_raw
from sdconvert.errors import DeviceError, EnvironmentProblem

Graph = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
_VIEWER_S = 120


@dataclass
class GraphRun:
    """What a runner got out of one graph: outputs by sample, times in milliseconds by name, memory in KiB."""

    answers: dict[str, dict[str, torch.Tensor]]
    times_ms: dict[str, list[float]]
    peak_kb: int | None = None


@dataclass
class BundleRun:
    """What a runner got out of a bundle."""

    soc: str
    graphs: dict[str, GraphRun]
    device: dict[str, Any] | None = None
    """What the phone says of itself; nothing where there is none."""
    notes: list[str] = field(default_factory=list)


class Runner(Protocol):
    """Runs every graph of a bundle for its answers, and again `inferences` times for its time."""

    name: str
    is_device: bool
    """Whether the times are those of a device."""

    def run(self, bundle: Path, manifest: Manifest, inferences: int) -> BundleRun:
        """Run a verified bundle."""

    def executor(self, bundle: Path, manifest: Manifest) -> Executor:
        """Return who answers the calls of a sampling loop over a bundle that `run` has run."""


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
    is_device: bool = False

    def run(self, bundle: Path, manifest: Manifest, inferences: int) -> BundleRun:
        """See `Runner`."""
        runs = {}
        for graph in graphs_of(manifest, self.soc):
            context = self.load(bundle / graph.epcontext)
            inputs = {
                sample.id: {
                    tensor.name: read_raw(bundle / f"inputs/{sample.id}/{tensor.name}.raw", tensor.dtype, tensor.shape)
                    for tensor in graph.inputs
                }
                for sample in manifest.samples
                if sample.graph == graph.name
            }
            answers = {sample: context(tensors) for sample, tensors in inputs.items()}
            times = []
            for _ in range(inferences):
                begin = time.perf_counter()
                context(next(iter(inputs.values())))
                times.append((time.perf_counter() - begin) * 1e3)
            runs[graph.name] = GraphRun(answers, {"simulator": times})
        return BundleRun(self.soc, runs, notes=["times are the simulator's on this computer, no figure of a device"])

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
    is_device: bool = True

    def run(self, bundle: Path, manifest: Manifest, inferences: int) -> BundleRun:
        """See `Runner`; pushes the bundle first.

        Raises:
            DeviceError: The phone did not do what was asked.
            EnvironmentProblem: A profile is binary, and no viewer converts it.
        """
        wanted = {**device_files(bundle, manifest, self.soc), **run_script(), **self.files}
        push(self.adb, wanted, self.remote)
        status = run_bundle(
            self.adb, manifest, self.soc, self.remote, inferences=inferences + self.warm_up, limit_s=self.limit_s
        )
        runs = {}
        with tempfile.TemporaryDirectory(prefix="sdconvert-") as scratch:
            results = Path(scratch) / "results"
            pull_results(self.adb, self.remote, status, results)
            for graph in graphs_of(manifest, self.soc):
                profile = self._profile(results / "latency" / graph.name / "qnn-profiling-data_0.log")
                times = read_profile(profile, "QNN (execute) time")[self.warm_up :]
                if len(times) != inferences:
                    raise DeviceError(
                        f"the profile of graph `{graph.name}` has {len(times)} times, not {inferences}",
                        hint="is the profile viewer of the same SDK as the runner?",
                    )
                runs[graph.name] = GraphRun(
                    _answers(results / "accuracy" / graph.name, manifest, graph),
                    {"QNN execute": times},
                    int(status.step("latency", graph.name)["peak_kb"]),
                )
        device = {key: value for key, value in vars(self.phone).items() if key != "soc"}
        return BundleRun(self.soc, runs, {**device, "soc": self.phone.soc.name}, list(self.phone.notes))

    def executor(self, bundle: Path, manifest: Manifest) -> Executor:
        """See `Runner`."""

        def times_ms(log: Path) -> list[float]:
            return read_profile(self._profile(log), "QNN (execute) time")

        return PhoneExecutor(self.adb, graphs_of(manifest, self.soc), self.remote, self.limit_s, times_ms)

    def _profile(self, log: Path) -> Path:
        """Return the profile as CSV; the runner writes it in a form of its own."""
        if log.read_bytes().startswith(b"Msg Timestamp"):
            return log
        if not self.viewer:
            raise EnvironmentProblem(f"`{log.name}` is binary", hint="give the SDK, which has qnn-profile-viewer")
        out = log.with_suffix(".csv")
        command = [str(self.viewer), "--input", str(log), "--output", str(out)]
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


def _answers(folder: Path, manifest: Manifest, graph: GraphRecord) -> dict[str, dict[str, torch.Tensor]]:
    samples = [sample.id for sample in manifest.samples if sample.graph == graph.name]
    # qnn-net-run writes float32 whatever the graph's own type is.
    return {
        sample: {
            output.name: read_raw(folder / f"Result_{index}" / f"{output.name}.raw", "float32", output.shape)
            for output in graph.outputs
        }
        for index, sample in enumerate(samples)
    }
