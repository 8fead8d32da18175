"""The budget holds for the process, measured by the system, for few samples and for many."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MIB = 1 << 20
SLACK = 8 * MIB  # what the allocator keeps


def measure(budget: int, folder: Path, root: Path) -> dict[str, Any]:
    program = root / "tests" / "quantize" / "adaround" / "adaround_memory.py"
    paths = os.pathsep.join([str(root / "tests"), str(program.parent)])
    command = [sys.executable, str(program), str(budget), str(folder)]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.slow
def test_memory_stays_within_the_budget_whatever_the_number_of_samples(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    modes: set[str] = set()
    losses = {}
    for budget in (28 * MIB, 64 * MIB, 256 * MIB):
        report = measure(budget, tmp_path / str(budget), pytestconfig.rootpath)
        for count in ("8", "64"):  # the first run loads code
            figures = report[count]
            assert figures["planned"] <= budget
            assert figures["grown"] < budget + SLACK
            modes |= set(figures["modes"])
        assert report["64"]["peak"] < 1.05 * report["8"]["peak"]
        losses[budget] = report["64"]["losses"]
    assert modes == {"gram", "rows", "panel"}
    for found in losses.values():
        assert found == pytest.approx(losses[256 * MIB], rel=0.023), "0.1 dB"
