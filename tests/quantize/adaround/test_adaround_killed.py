"""A process killed at any moment leaves what the next one goes on from, to the same bits, and nothing else."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from adaround_graphs import block_graph, block_samples, int4_grids

from sdconvert.quantize.adaround.run import AdaRoundResult, AdaRoundSettings, adaround

BUDGET = 1_000_000  # bytes: some moments and most waiting tensors lie on the disk


def run(samples: int, folder: Path) -> AdaRoundResult:
    traced = block_graph()
    settings = AdaRoundSettings(budget_bytes=BUDGET)
    return adaround(traced, block_samples(samples), int4_grids(traced), settings, folder)


def killed(samples: int, folder: Path, after_s: float, root: Path) -> bool:
    """Start a process and kill it some time after AdaRound has begun; whether it was still running."""
    program = root / "tests" / "quantize" / "adaround" / "adaround_killed.py"
    paths = os.pathsep.join([str(root), str(root / "tests"), str(program.parent)])
    command = [sys.executable, str(program), str(BUDGET), str(samples), str(folder)]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begin\n"
        time.sleep(after_s)
        process.kill()
    assert process.returncode in (0, -signal.SIGKILL)
    return process.returncode != 0


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("kills", "samples"), [(2, 16), pytest.param(20, 64, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path: Path, pytestconfig: pytest.Config, kills: int, samples: int) -> None:
    start = time.monotonic()
    whole = run(samples, tmp_path / "whole")
    seconds = time.monotonic() - start
    expected = files(tmp_path / "whole")
    assert expected.keys() == {f"groups/{group.path.name}" for group in whole.groups}
    generator = torch.Generator().manual_seed(0)
    done = resumed = 0
    while done < kills:
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        for _ in range(2):  # what goes on is killed as well
            part = float(torch.rand(1, generator=generator))
            done += killed(samples, tmp_path / "killed", part * seconds, pytestconfig.rootpath)
        result = run(samples, tmp_path / "killed")
        resumed += result.resumed
        assert files(tmp_path / "killed") == expected
        assert result.output_sqnr_db == whole.output_sqnr_db
        assert result.figures == whole.figures
    assert resumed, "no moment came after a finished group"
