"""What the HTP compiler did when, from the profile that QNN's provider writes of it."""

import csv
from pathlib import Path

_SECONDS = {"US": 1e-6, "MS": 1e-3, "S": 1.0}


def profile_path(folder: Path) -> Path:
    """Where the provider is to write its profile (`profiling_file_path`)."""
    return folder / "profile.csv"


def read_phases(folder: Path) -> dict[str, float]:
    """Seconds of each phase of compiling a graph, in their order and by the compiler's own names."""
    with profile_path(folder).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # The phases are parts of the one root event, which is called FINALIZE.
    return {
        row["Event Identifier"]: int(row["Time"]) * _SECONDS[row["Unit of Measurement"]]
        for row in rows
        if row["Event Level"] == "SUB-EVENT"
    }
