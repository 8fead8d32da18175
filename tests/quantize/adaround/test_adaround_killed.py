"""A process killed at any moment leaves what the next one goes on from, to the same bits, and nothing else."""

import shutil
import signal
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from adaround_graphs import block_graph, block_samples, int4_grids

from sdconvert.quantize.adaround.run import AdaRoundResult, AdaRoundSettings, adaround

BUDGET = 1_000_000  # bytes: some moments and most waiting tensors lie on the disk


def run(samples: int, folder: Path, begun: Connection | None = None) -> AdaRoundResult:
    traced = block_graph()
    if begun:
        begun.send(None)
    settings = AdaRoundSettings(budget_bytes=BUDGET)
    return adaround(traced, block_samples(samples), int4_grids(traced), settings, folder)


def killed(samples: int, folder: Path, after_s: float) -> bool:
    """Fork a process and kill it some time after AdaRound has begun; whether it was still running."""
    context = get_context("fork")  # a new interpreter would import for longer than AdaRound takes here
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(samples, folder, writer))
    process.start()
    writer.close()
    assert reader.poll(120), "AdaRound has not begun"
    reader.recv()
    time.sleep(after_s)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("kills", "samples"), [(2, 16), pytest.param(20, 64, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path: Path, kills: int, samples: int) -> None:
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
            done += killed(samples, tmp_path / "killed", part * seconds)
        result = run(samples, tmp_path / "killed")
        resumed += result.resumed
        assert files(tmp_path / "killed") == expected
        assert result.output_sqnr_db == whole.output_sqnr_db
        assert result.figures == whole.figures
    assert resumed, "no moment came after a finished group"
