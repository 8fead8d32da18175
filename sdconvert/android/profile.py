"""A profile as qnn-profile-viewer writes it: times of whole inferences, counters, and cycles of single ops.

    Msg Timestamp,Message,Time,Unit of Measurement,Timing Source,Event Level,Event Identifier
    0,BACKEND,4,COUNT,BACKEND,ROOT,Number of HVX threads used
    0,NODE,19846,CYCLES,BACKEND,SUB-EVENT,Sigmoid4:OpId_17 (cycles)
    0,EXECUTE,27355,US,BACKEND,ROOT,QNN (execute) time

Cycles of an op are summed over the units that work on it, so they say how ops compare, not how long one takes.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from sdconvert.errors import DeviceError

EXECUTE, LOAD = "QNN (execute) time", "QNN (load binary) time"
_NPU = ("Accelerator (execute) time", "QNN accelerator (execute) time")
_MS = {"US": 1e-3, "MS": 1.0}
_OP = re.compile(r"^(.+?)[: ]OpId_\d+ \(cycles\)$")
_TOP = 20


@dataclass(frozen=True)
class Row:
    """One line; times in milliseconds, everything else in the profile's own unit."""

    name: str
    value: float
    unit: str
    is_root: bool


class Profile:
    """All lines of a profile, in their order.

    Args:
        file: CSV, as qnn-profile-viewer and ONNX Runtime write it.
    """

    def __init__(self, file: Path) -> None:
        self._file = file.name
        self._rows = list(_rows(file))

    def times_ms(self, name: str) -> list[float]:
        """Return the times of all lines called `name`, in milliseconds.

        Raises:
            DeviceError: There is none.
        """
        found = [row.value for row in self._rows if row.name == name and row.unit == "ms"]
        if not found:
            raise DeviceError(f"profile `{self._file}` has no time called `{name}`", hint="convert it as CSV")
        return found

    def npu_ms(self) -> list[float]:
        """Return how long the NPU alone took for each inference, in milliseconds; nothing where no line says."""
        for name in _NPU:
            if found := [row.value for row in self._rows if row.name == name and row.unit == "ms"]:
                return found
        return []

    def load_ms(self) -> float | None:
        """Return how long the context took to load, where the profile says."""
        return next((row.value for row in self._rows if row.name == LOAD and row.unit == "ms"), None)

    def counters(self) -> dict[str, float]:
        """Return the median of everything counted about whole inferences, such as HVX threads or bytes of DDR."""
        found: dict[str, list[float]] = defaultdict(list)
        for row in self._rows:
            if row.is_root and row.unit not in ("ms", "CYCLES"):
                found[row.name].append(row.value)
        return {name: median(values) for name, values in found.items()}

    def ops(self) -> dict[str, Any]:
        """Return the ops with the most cycles, median of all inferences: name, cycles and share of all ops' cycles.

        Raises:
            DeviceError: The profile has no ops.
        """
        found: dict[str, list[float]] = defaultdict(list)
        for row in self._rows:
            if row.unit == "CYCLES" and not row.is_root and _OP.match(row.name):
                found[row.name].append(row.value)
        if not found:
            raise DeviceError(f"profile `{self._file}` has no cycles of ops", hint="was it taken as a detailed one?")
        cycles = {name: median(values) for name, values in found.items()}
        total = sum(cycles.values())
        ordered = sorted(cycles, key=lambda name: -cycles[name])
        return {
            "ops": len(cycles),
            "cycles": total,
            "top": [
                {
                    "op": name.removesuffix(" (cycles)"),
                    "cycles": cycles[name],
                    "share": cycles[name] / total if total else 0.0,
                }
                for name in ordered[:_TOP]
            ],
            "stages_ms": self._stages(),
            "counters": self.counters(),
        }

    def _stages(self) -> dict[str, float]:
        """Every time of whole inferences, such as waiting for VTCM, as median."""
        found: dict[str, list[float]] = defaultdict(list)
        for row in self._rows:
            if row.is_root and row.unit == "ms":
                found[row.name].append(row.value)
        return {name: median(values) for name, values in found.items()}


def _rows(file: Path) -> Iterator[Row]:
    text = file.read_text(encoding="utf-8", errors="replace")
    for row in csv.DictReader(text.splitlines()):
        unit = row.get("Unit of Measurement") or ""
        try:
            value = float(row.get("Time") or "")
        except ValueError:
            continue
        yield Row(
            name=row.get("Event Identifier") or row.get("Message") or "",
            value=value * _MS.get(unit, 1.0),
            unit="ms" if unit in _MS else unit,
            is_root=row.get("Event Level") == "ROOT",
        )
