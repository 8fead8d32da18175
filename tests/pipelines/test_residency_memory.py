"""The limit holds for the process, not only on paper: peak memory, measured by the system, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("padded_run.py")
PADDING = 48 << 20
SLACK = 36 << 20  # activations, what is mapped while a file is read, and what the allocator keeps


@pytest.mark.slow
def test_d7_peak_memory_stays_under_the_limit_and_does_not_creep(pasd_folder: Path) -> None:
    """Four models of 48 MiB; the sampling loop calls two of them together."""
    limit = 2 * PADDING + (16 << 20)
    command = [sys.executable, str(PROGRAM), str(pasd_folder), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["limited"] < limit + SLACK < PADDING + limit, "below the largest component and the limit"
    assert report["creep"] < 8 << 20
    assert report["free"] > 4 * PADDING > limit + SLACK, "without residency all four are in memory"
