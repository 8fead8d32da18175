"""How warm a phone is, waiting until it is cool, and the verdict on times that were taken while it throttled."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_SENSOR = re.compile(r"Temperature\{mValue=(-?\d+(?:\.\d+)?), mType=(\d+), mName=([^,}]+), mStatus=\d+\}")
_KINDS = {"2", "3", "9"}
"""Android's types BATTERY, SKIN and NPU. The others, the processor's above all, jump with every command of adb."""
_WARMER_C = 3.0
_RISE_C = 1.0
SCATTER = 1.3
"""Ratio of the 90th percentile to the median above which times are suspicious."""
COMMANDS = "dumpsys thermalservice; dumpsys battery"
"""What a phone is asked; `parse_climate` reads the answers."""


@dataclass(frozen=True)
class Climate:
    """What a phone says of its temperature at one moment.

    Attributes:
        status: Android's thermal status: 0 none, 1 light, 2 moderate, 3 severe, above that critical to shutdown.
        celsius: Degrees by sensor: battery, skin and NPU, as far as the phone names them.
    """

    status: int | None = None
    celsius: dict[str, float] = field(default_factory=dict)

    def rise(self, earlier: "Climate") -> tuple[str, float]:
        """Return the sensor that has warmed most since `earlier`, and by how many degrees; without one, ("", 0.0)."""
        shared = {name: self.celsius[name] - earlier.celsius[name] for name in self.celsius if name in earlier.celsius}
        return max(shared.items(), key=lambda item: item[1], default=("", 0.0))

    def record(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return {"status": self.status, "celsius": self.celsius}


@dataclass(frozen=True)
class CoolDown:
    """How a wait for a cool phone ended; `warm` says why it is still warm, and is empty if it is not."""

    seconds: float
    warm: str


def parse_climate(text: str) -> Climate:
    """Read what `COMMANDS` print; a sensor that is named twice counts with its last reading."""
    status = re.search(r"^\s*Thermal Status: (\d+)", text, re.MULTILINE)
    celsius = {name: float(value) for value, kind, name in _SENSOR.findall(text) if kind in _KINDS}
    if battery := re.search(r"^\s*temperature: (-?\d+)", text, re.MULTILINE):
        celsius["battery"] = int(battery[1]) / 10  # Android counts tenths
    return Climate(int(status[1]) if status else None, celsius)


def cool_down(read: Callable[[], Climate], start: Climate, limit_s: float, poll_s: float = 5.0) -> CoolDown:
    """Wait until the phone has thermal status 0 and every sensor is within 3 degrees of `start`, or the limit is over.

    Args:
        read: Asks the phone.
        start: How it was before it had anything to do.
        limit_s: Seconds after which it is taken as it is.
        poll_s: Seconds between two questions.
    """
    begin = time.monotonic()
    while True:
        now = read()
        warm, waited = _warm(now, start), time.monotonic() - begin
        if not warm or waited >= limit_s:
            return CoolDown(waited, warm)
        time.sleep(min(poll_s, limit_s - waited))


def throttled(p50_ms: float, p90_ms: float, climates: Sequence[tuple[Climate, Climate]]) -> str:
    """Return why times say nothing about the graph, or the empty string.

    Args:
        p50_ms: Their median.
        p90_ms: Their 90th percentile.
        climates: How the phone was before and after each run that the times come from, in their order.
    """
    status = max((one.status or 0 for pair in climates for one in pair), default=0)
    if status:
        return f"thermal status {status}"
    sensor, rise = max((after.rise(before) for before, after in climates), key=lambda one: one[1], default=("", 0.0))
    if len(climates) > 1:
        sensor, rise = max((sensor, rise), climates[-1][1].rise(climates[0][0]), key=lambda one: one[1])
    scatter = p90_ms / p50_ms if p50_ms else 1.0
    if scatter > SCATTER and rise >= _RISE_C:
        return f"p90/p50 = {scatter:.2f} while {sensor} rose by {rise:.1f} °C"
    return ""


def _warm(now: Climate, start: Climate) -> str:
    if now.status:
        return f"thermal status {now.status}"
    sensor, rise = now.rise(start)
    return f"{sensor} is {rise:.1f} °C above the start" if rise >= _WARMER_C else ""
