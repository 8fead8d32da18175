"""What the global options say, and the two ways out: data on stdout, the rest on stderr."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH_OF_FILES = 160  # a pipe or a file has no width of its own


class ProgressStyle(StrEnum):
    """How progress appears on stderr."""

    AUTO = "auto"
    RICH = "rich"
    PLAIN = "plain"
    JSON = "json"
    NONE = "none"


@dataclass
class Session:
    """The global options of one call, and whether its one JSON object is out already."""

    json: bool = False
    progress: ProgressStyle = ProgressStyle.AUTO
    verbosity: int = 0
    shown: bool = False

    def show(self, data: Mapping[str, Any], *blocks: "Table | str") -> None:
        """Print a result: as one JSON object if asked for, otherwise as tables and lines for a reader."""
        self.shown = True
        if self.json:
            from sdconvert.io.files import to_json

            print(to_json(data))
            return
        console = make_console(stderr=False)
        for block in blocks:
            if isinstance(block, Table):
                block.print(console)
            else:
                console.print(block, soft_wrap=True)

    def fail(self, message: str, hint: str, exit_code: int) -> None:
        """Print an error to stderr; who asked for JSON and has not got any result gets it as JSON on stdout too."""
        if self.json and not self.shown:
            print(json.dumps({"error": {"message": message, "hint": hint, "exit_code": exit_code}}))
        print(f"error: {message}", file=sys.stderr)
        if hint:
            print(f"\nhint: {hint}", file=sys.stderr)


@dataclass(frozen=True)
class Table:
    """Rows under headings; columns in `right` hold numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    right: tuple[str, ...] = ()

    def print(self, console: "Console") -> None:
        """Print the table, wrapped to the width of the console."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable

        table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
        for column in self.columns:
            table.add_column(column, justify="right" if column in self.right else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(str(cell) for cell in row))
        console.print(table)


def make_console(*, stderr: bool) -> "Console":
    """Make a console that prints text as it is; colour obeys the terminal and NO_COLOR."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _WIDTH_OF_FILES
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=width)


def amount(size: float) -> str:
    """Return a number of bytes for a reader: `12.3 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
