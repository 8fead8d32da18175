"""Answer the calls of a sampling loop on a phone: one start of the runner for all calls of a graph.

    REMOTE/loop/                      beside `bundle` and `out`
      in/<sha256>.raw                 inputs, each sent once however often it is asked for
      <graph>.txt, <graph>.sums       input list of the last call, and the checksums of what it names
      status, answer-<graph>.log      as in `out`
      answer/<graph>/Result_<i>/      answers of the last call

Answers that only other graphs take stay there: their input lists name the file where it lies.
"""

import hashlib
import secrets
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdconvert.android.adb import Adb, quoted
from sdconvert.android.device_run import graph_argument, read_status, require_all_answers
from sdconvert.android.executors import Answered
from sdconvert.android.manifest import GraphRecord, TensorRecord
from sdconvert.android.scores import read_raw
from sdconvert.errors import DeviceError, UsageError

_PROFILE = "qnn-profiling-data_0.log"
_SHORT_S = 30.0
_SLOWEST = 2_000_000
"""Bytes per second below which a phone or its cable counts as hung."""


@dataclass
class PhoneExecutor:
    """The runner on a phone, over the contexts of a bundle that was pushed and checked.

    Args:
        adb: The phone's client.
        graphs: Of the phone's SoC.
        remote: Folder on the phone.
        limit_s: Seconds after which a runner counts as hung.
        times_ms: Reads the time of every inference off a runner's profile.
    """

    adb: Adb
    graphs: Sequence[GraphRecord]
    remote: str
    limit_s: int
    times_ms: Callable[[Path], list[float]]
    _sent: set[str] = field(default_factory=set)
    _kept: dict[str, list[tuple[Tensor, str]]] = field(default_factory=dict)
    _began: bool = False

    def execute(self, graph: str, calls: Sequence[Mapping[str, Tensor]], *, keep: bool) -> Answered:
        """See `Executor`."""
        self._begin()
        record = next(one for one in self.graphs if one.name == graph)
        with tempfile.TemporaryDirectory(prefix="sdconvert-") as scratch:
            folder = Path(scratch)
            listed = self._send(record, calls, folder)
            self._kept.pop(graph, None)  # run.sh removes the answers of the call before
            self._run(record, len(calls), listed)
            return self._fetch(record, len(calls), folder / "came", keep)

    def _begin(self) -> None:
        if not self._began:
            loop = f"{self.remote}/loop"
            self._shell(f"rm -rf {loop} && mkdir -p {loop}/in", "the loop's folder was made")
            self._began = True

    def _send(self, record: GraphRecord, calls: Sequence[Mapping[str, Tensor]], folder: Path) -> int:
        """Send input list and inputs; returns how many files the phone is to check."""
        sums: dict[str, str] = {}
        fresh: list[Path] = []
        lines = []
        for call in calls:
            if call.keys() != {tensor.name for tensor in record.inputs}:
                found = ", ".join(call)
                raise UsageError(f"graph `{record.name}` is called with {found}", hint="package the bundle again")
            words = []
            for tensor in record.inputs:
                path = self._held(call[tensor.name])
                if path is None:
                    content = _raw(record, tensor, call[tensor.name])
                    digest = hashlib.sha256(content).hexdigest()
                    path = f"../loop/in/{digest}.raw"
                    sums[path] = digest
                    if digest not in self._sent:
                        fresh.append(folder / f"{digest}.raw")
                        fresh[-1].write_bytes(content)
                        self._sent.add(digest)
                words.append(f"{tensor.name}:={path}")
            lines.append(" ".join(words))
        text = "".join(f"{line}\n" for line in lines)
        sums[f"../loop/{record.name}.txt"] = hashlib.sha256(text.encode()).hexdigest()
        (folder / f"{record.name}.txt").write_text(text)
        (folder / f"{record.name}.sums").write_text("".join(f"{sums[path]}  {path}\n" for path in sorted(sums)))
        nbytes = sum(path.stat().st_size for path in fresh)
        if fresh:
            self.adb.push(fresh, f"{self.remote}/loop/in", timeout_s=_SHORT_S + nbytes / _SLOWEST)
        notes = [folder / f"{record.name}.{suffix}" for suffix in ("txt", "sums")]
        self.adb.push(notes, f"{self.remote}/loop", timeout_s=_SHORT_S)
        return len(sums)

    def _held(self, tensor: Tensor) -> str | None:
        """Return where on the phone a tensor lies that was held back."""
        places = [path for kept in self._kept.values() for one, path in kept if one is tensor]
        return places[0] if places else None

    def _run(self, record: GraphRecord, count: int, listed: int) -> None:
        run, loop = secrets.token_hex(8), f"{self.remote}/loop"
        words = ("sh", f"{self.remote}/bundle/run.sh", run, record.soc, str(self.limit_s), "loop")
        # In place of the shell that adb starts, which is the one that hears of a lost connection.
        command = f"exec {quoted(*words, graph_argument(record))}"
        timeout_s = 2 * _SHORT_S + 2 * self.limit_s
        answer = self.adb.shell(command, timeout_s=timeout_s, doing=f"graph `{record.name}` was run")
        status = read_status(self.adb, loop, run, answer)
        require_all_answers(record, count, status.step("answer", record.name))
        if status.steps[0].figures != {"files": str(listed)}:
            raise DeviceError(
                f"device `{self.adb.serial}` checked {status.steps[0].figures} of {listed} files for `{record.name}`",
                hint="run the same command again",
            )

    def _fetch(self, record: GraphRecord, count: int, came: Path, keep: bool) -> Answered:
        there = f"../loop/answer/{record.name}"
        nbytes = 0 if keep else count * sum(4 * prod(output.shape) for output in record.outputs)
        source = f"{self.remote}/loop/answer/{record.name}"
        if keep:
            came.mkdir()
            self.adb.pull(f"{source}/{_PROFILE}", came / _PROFILE, timeout_s=_SHORT_S)
        else:
            self.adb.pull(source, came, timeout_s=_SHORT_S + nbytes / _SLOWEST)
        times = self.times_ms(came / _PROFILE)
        if len(times) != count:
            raise DeviceError(
                f"the profile of graph `{record.name}` has {len(times)} times, not {count}",
                hint="is the profile viewer of the same SDK as the runner?",
            )
        if keep:
            outputs = [
                {one.name: torch.empty(one.shape, device="meta") for one in record.outputs} for _ in range(count)
            ]
            self._kept[record.name] = [
                (tensor, f"{there}/Result_{index}/{name}.raw")
                for index, tensors in enumerate(outputs)
                for name, tensor in tensors.items()
            ]
            return Answered(outputs, times)
        return Answered([self._pulled(record, came / f"Result_{index}") for index in range(count)], times)

    def _pulled(self, record: GraphRecord, folder: Path) -> dict[str, Tensor]:
        """Read an answer; qnn-net-run writes float32 whatever the graph's own type is."""
        for output in record.outputs:
            file = folder / f"{output.name}.raw"
            if not file.is_file() or file.stat().st_size != 4 * prod(output.shape):
                raise DeviceError(
                    f"`{folder.name}/{file.name}` of graph `{record.name}` did not come whole from device "
                    f"`{self.adb.serial}`",
                    hint="run the same command again",
                )
        return {one.name: read_raw(folder / f"{one.name}.raw", "float32", one.shape) for one in record.outputs}

    def _shell(self, command: str, doing: str) -> None:
        self.adb.shell_ok(command, timeout_s=_SHORT_S, doing=doing)


def _raw(record: GraphRecord, spec: TensorRecord, tensor: Tensor) -> bytes:
    if tuple(tensor.shape) != spec.shape or tensor.is_meta:
        found = "an answer that is gone" if tensor.is_meta else str(list(tensor.shape))
        raise UsageError(
            f"`{spec.name}` of graph `{record.name}` is {found}, not {list(spec.shape)}",
            hint="package the bundle again: its pictures and graphs are of one recipe then",
        )
    dtype = "<i4" if spec.dtype == "int32" else "<f4"
    return bytes(np.ascontiguousarray(tensor.detach().cpu().numpy()).astype(dtype).tobytes())
