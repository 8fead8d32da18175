"""Run a pushed bundle on a phone, believe its status file alone, and fetch the results.

`run.sh`, which is sent along, does the work on the phone and describes the status file.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from math import prod
from pathlib import Path

from sdconvert.android.adb import Adb, ShellAnswer, quoted
from sdconvert.android.device import free_bytes
from sdconvert.android.device_log import explain_log
from sdconvert.android.manifest import GraphRecord, Manifest
from sdconvert.android.push import LocalFile, local_file
from sdconvert.errors import DeviceError, DeviceFullError, DeviceLostError, DeviceTimeoutError, UsageError
from sdconvert.io.files import atomic_folder

_SCRIPT = "run.sh"
_SHORT_S = 30.0
_SLOWEST = 2_000_000
_CANNOT_WRITE = 9
"""Exit code of run.sh when even its status cannot be written."""
_AGAIN = "run the same command again"


@dataclass(frozen=True)
class Step:
    """One line `accuracy ok graph=unet bytes=512 ...` of the status file."""

    name: str
    figures: dict[str, str]


@dataclass(frozen=True)
class RunStatus:
    """The status file of a run that reached its end."""

    text: str
    steps: tuple[Step, ...]

    def step(self, name: str, graph: str) -> dict[str, str]:
        """Return the figures of one step of one graph; empty if the status has none."""
        return next((s.figures for s in self.steps if s.name == name and s.figures.get("graph") == graph), {})


def run_script() -> dict[str, LocalFile]:
    """Return what has to be pushed along so that the bundle can be run."""
    return {_SCRIPT: local_file(Path(str(files("sdconvert.android") / _SCRIPT)))}


def run_bundle(
    adb: Adb,
    manifest: Manifest,
    soc: str,
    remote: str,
    steps: Sequence[str],
    *,
    limit_s: int,
    only: str | None = None,
) -> RunStatus:
    """Take graphs through steps on the phone; what an earlier run left there goes.

    Args:
        adb: The device, with the bundle in `remote` and a runner in its `bin/qnn-net-run`.
        manifest: The bundle's.
        soc: The SoC of the bundle whose contexts are run.
        remote: The folder that the bundle was pushed to; results are in its `out`.
        steps: As `run.sh` takes them, such as `check`, `env`, `accuracy`, `latency=100`.
        limit_s: Seconds after which a runner counts as hung.
        only: Name of the one graph to run; without it all.

    Raises:
        UsageError: A graph has inputs of several types.
        DeviceTimeoutError: A runner, or the phone, hung.
        DeviceLostError: The connection broke.
        DeviceFullError: The phone ran out of space.
        DeviceError: A step failed, or its results are not whole.
    """
    graphs = [graph for graph in manifest.graphs if graph.soc == soc and only in (None, graph.name)]
    arguments = [graph_argument(graph) for graph in graphs]
    run = secrets.token_hex(8)
    # In place of the shell that adb starts, which is the one that hears of a lost connection.
    command = "exec " + quoted("sh", f"{remote}/bundle/{_SCRIPT}", run, soc, str(limit_s), " ".join(steps), *arguments)
    timeout_s = 2 * _SHORT_S + limit_s * (1 + len(steps) * len(graphs))
    answer = adb.shell(command, timeout_s=timeout_s, doing="the graphs were run")
    status = read_status(adb, f"{remote}/out", run, answer)
    for graph in graphs:
        for step in steps:
            _check_whole(manifest, graph, step.partition("=")[0], status)
    return status


def require_all_answers(graph: GraphRecord, samples: int, found: Mapping[str, str]) -> None:
    """Check that a runner answered every sample of a graph, whole.

    Args:
        graph: The graph.
        samples: How many it was asked for.
        found: What the status file says of the step.

    Raises:
        DeviceError: Answers, files or bytes are fewer or more.
    """
    nbytes = sum(4 * prod(output.shape) for output in graph.outputs)
    wanted = {"results": samples, "files": samples * len(graph.outputs), "bytes": samples * nbytes}
    if {key: int(found.get(key, 0)) for key in wanted} != wanted:
        raise DeviceError(
            f"the runner answered {found} for graph `{graph.name}`; {wanted} were to come",
            hint="is it a qnn-net-run of the QAIRT build that the bundle names, without native output files?",
        )


def read_status(adb: Adb, out: str, run: str, answer: ShellAnswer) -> RunStatus:
    """Return the status that `run.sh` left in the folder `out` of a device, if it reached its end.

    Args:
        adb: The device.
        out: Where run.sh puts everything.
        run: What the run was called.
        answer: What the shell said of it, which explains only why there is no status.

    Raises:
        DeviceError: As `run_bundle`.
    """
    told = adb.shell(quoted("cat", f"{out}/status"), timeout_s=_SHORT_S, doing="the status was read").out
    lines = told.split()[:2] == ["run", run] and told.splitlines()
    if not lines or lines[-1] != "done":
        raise _failure(adb, out, lines[-1] if lines else "", f"{answer.err}\n{answer.out}", answer.code)
    return RunStatus(told, tuple(_step(line) for line in lines if " ok" in line))


def pull_results(adb: Adb, remote: str, status: RunStatus, folder: Path) -> None:
    """Fetch what a run left into `folder`, which appears whole or not at all.

    Raises:
        EnvironmentProblem: The disk of this computer is full.
        DeviceError: What came is not what the status says, or as `Adb.pull`.
    """
    total = sum(int(step.figures.get("bytes", 0)) for step in status.steps)
    with atomic_folder(folder) as work:
        adb.pull(f"{remote}/out", work / "out", timeout_s=_SHORT_S + total / _SLOWEST)
        for path in (work / "out").iterdir():
            path.rename(work / path.name)
        (work / "out").rmdir()
        if (work / "status").read_text(encoding="utf-8") != status.text:
            raise DeviceError(f"the results on device `{adb.serial}` are of another run", hint=_AGAIN)
        for step in status.steps:
            if step.name == "accuracy":
                _check_pulled(adb, work, step.figures)


def graph_argument(graph: GraphRecord) -> str:
    """Name a graph for run.sh; the runner takes all its inputs as float32, or all in the graph's own type."""
    types = {tensor.dtype for tensor in graph.inputs}
    if len(types) > 1:
        raise UsageError(
            f"graph `{graph.name}` has inputs of types {', '.join(sorted(types))}",
            hint="the runner on the phone reads all inputs of a graph in one way: split the graph",
        )
    return f"{graph.name}:native" if types == {"int32"} else graph.name


def _check_pulled(adb: Adb, folder: Path, told: dict[str, str]) -> None:
    came = list((folder / "accuracy" / told["graph"]).glob("Result_*/*.raw"))
    found = (len(came), sum(path.stat().st_size for path in came))
    if found != (int(told["files"]), int(told["bytes"])):
        raise DeviceError(
            f"of graph `{told['graph']}` {found[0]} files with {found[1]} bytes came; device `{adb.serial}` has "
            f"{told['files']} with {told['bytes']}",
            hint=_AGAIN,
        )


def _step(line: str) -> Step:
    name, _, *figures = line.split()
    return Step(name, dict(re.findall(r"(\w+)=(\S+)", " ".join(figures))))


def _check_whole(manifest: Manifest, graph: GraphRecord, step: str, status: RunStatus) -> None:
    if step in ("check", "env"):
        return
    found = status.step(step, graph.name)
    if not found:
        raise DeviceError(f"graph `{graph.name}` has no {step} run", hint=_AGAIN)
    if step != "accuracy":
        return
    require_all_answers(graph, sum(sample.graph == graph.name for sample in manifest.samples), found)


def _failure(adb: Adb, out: str, last: str, said: str, code: int) -> DeviceError:
    name = f"device `{adb.serial}`"
    if code == _CANNOT_WRITE:
        free = free_bytes(adb, out.rpartition("/")[0]) / 1e6
        return DeviceFullError(
            f"{name} could not write below {out} after `{last or 'the start'}`; {free:.1f} MB are free there",
            hint=f"free some space on the phone and {_AGAIN}",
        )
    match last.split():
        case ["fail", step, why, *detail]:
            return _told_failure(adb, out, step, why, detail)
        case _:
            shown = next((line for line in said.splitlines() if line.strip()), "nothing")
            return DeviceLostError(
                f"the run on {name} was killed after `{last or 'the start'}` (exit code {code}, it said `{shown}`)",
                hint=f"Android ends programs when memory is short: close apps on the phone and {_AGAIN}",
            )


def _told_failure(adb: Adb, out: str, step: str, why: str, detail: list[str]) -> DeviceError:
    name, what = f"device `{adb.serial}`", " ".join(detail)
    match why:
        case "bad_checksum":
            return DeviceError(f"`{what}` on {name} is damaged", hint=f"{_AGAIN}: the file is sent again")
        case "no_runner":
            return DeviceError(f"{name} has no runner `{what}`", hint="it is part of the QAIRT SDK: --qairt-sdk DIR")
        case "hung":
            return DeviceTimeoutError(
                f"the runner hung on {name} in step `{step}` and was ended after {what} s",
                hint=f"restart the phone, which also restarts its DSP, and {_AGAIN}",
            )
        case "hangup":
            return DeviceLostError(f"the connection to {name} broke in step `{step}`", hint=_AGAIN)
        case "no_space":
            return DeviceFullError(f"{name} has no room for `{what}`", hint=f"free some and {_AGAIN}")
        case "no_profile":
            return DeviceError(f"the runner on {name} wrote no profile of graph `{what}`", hint="is it qnn-net-run?")
    log = f"{out}/{step}.log" if why == "runner_unusable" else f"{out}/{step}-{detail[0]}.log"
    text = adb.shell(quoted("tail", "-n", "20", log), timeout_s=_SHORT_S, doing="the log was read").out.strip()
    shown = text.splitlines()[-1] if text else "nothing"
    return DeviceError(
        f"the runner on {name} failed in step `{step}` (exit code {detail[-1]}); its log ends with `{shown}`",
        hint=explain_log(text) or f"the whole log is {log} on the phone",
    )
