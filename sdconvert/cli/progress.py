"""Progress of a run on stderr: bars for a terminal, lines for a log, JSON lines for a program, or nothing."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from sdconvert.cli.session import ProgressStyle, make_console
from sdconvert.stages import Progress, StageOutcome, Titled

_SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def open_progress(style: ProgressStyle) -> Iterator[Progress]:
    """Show a run's progress in the given style while the context lasts."""
    if style is ProgressStyle.AUTO:
        style = ProgressStyle.RICH if sys.stderr.isatty() else ProgressStyle.PLAIN
    if style is ProgressStyle.NONE:
        yield NoProgress()
    elif style is ProgressStyle.JSON:
        yield JsonProgress()
    elif style is ProgressStyle.PLAIN:
        yield PlainProgress()
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Bars(*columns, TextColumn("{task.fields[note]}"), console=make_console(stderr=True)) as bars:
            yield BarProgress(bars)


class NoProgress:
    """Says nothing."""

    def begin(self, stage: Titled, why: str) -> None:
        """Say nothing."""

    def step(self, done: int, total: int, note: str = "") -> None:
        """Say nothing."""

    def end(self, outcome: StageOutcome) -> None:
        """Say nothing."""


class PlainProgress:
    """Lines of text, at most one every few seconds while a stage runs."""

    def __init__(self) -> None:
        self._stage = ""
        self._next_line = 0.0

    def begin(self, stage: Titled, why: str) -> None:
        """Name the stage and why it runs."""
        self._stage, self._next_line = stage.name, time.monotonic() + _SECONDS_BETWEEN_LINES
        print(f"{stage.name}: {stage.title} ({why})", file=sys.stderr, flush=True)

    def step(self, done: int, total: int, note: str = "") -> None:
        """Say how far the stage is, unless a line was printed just now."""
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            print(f"{self._stage}: {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)

    def end(self, outcome: StageOutcome) -> None:
        """Say what became of the stage."""
        print(_ending(outcome), file=sys.stderr, flush=True)


class JsonProgress:
    """One JSON object per line and event."""

    def __init__(self) -> None:
        self._stage = ""

    def begin(self, stage: Titled, why: str) -> None:
        """Write the event `begin`."""
        self._stage = stage.name
        self._write(event="begin", title=stage.title, why=why)

    def step(self, done: int, total: int, note: str = "") -> None:
        """Write the event `step`."""
        self._write(event="step", done=done, total=total, note=note)

    def end(self, outcome: StageOutcome) -> None:
        """Write the event `end`."""
        self._stage = outcome.stage
        self._write(event="end", state=outcome.state, why=outcome.why, seconds=outcome.seconds)

    def _write(self, **event: Any) -> None:
        print(json.dumps({"stage": self._stage, **event}), file=sys.stderr, flush=True)


class BarProgress:
    """A bar for the stage at work, and a line above it for each that is done."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def begin(self, stage: Titled, why: str) -> None:
        """Start the stage's bar; it pulses until the first step."""
        self._bars.console.print(f"{stage.name}: {stage.title} ({why})")
        self._task = self._bars.add_task(stage.name, total=None, note="")

    def step(self, done: int, total: int, note: str = "") -> None:
        """Move the bar."""
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total, note=note)

    def end(self, outcome: StageOutcome) -> None:
        """Replace the bar by a line."""
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        self._bars.console.print(_ending(outcome))


def _ending(outcome: StageOutcome) -> str:
    if outcome.state == "reused":
        return f"{outcome.stage}: reused, {outcome.why}"
    return f"{outcome.stage}: finished in {outcome.seconds:.1f} s"
