"""Tasks in processes: every result comes with its number, and a failure is told as it is."""

import os
import signal
import time
from pathlib import Path

import pytest

from sdconvert.errors import CompileError, EnvironmentProblem
from sdconvert.processes import in_processes, in_threads, jobs_for


def square(number: int) -> int:
    return number**2


def where() -> tuple[int, int]:
    import torch

    return os.getpid(), torch.get_num_threads()


def refuse(name: str) -> None:
    raise CompileError(f"`{name}` is refused", hint="compile another")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_late(path: Path) -> None:
    time.sleep(0.2)
    path.write_text("begun")


def test_every_result_comes_with_its_number() -> None:
    tasks = [(square, (number,)) for number in range(3)]
    assert dict(in_processes(tasks)) == dict(in_threads(tasks, 2)) == {number: number**2 for number in range(3)}


def test_each_task_has_a_process_with_one_thread() -> None:
    found = dict(in_processes([(where, ()), (os.getpid, ())]))
    first, threads = found[0]
    assert len({first, found[1], os.getpid()}) == 3
    assert threads == 1


def test_an_error_keeps_class_text_and_hint_and_what_has_not_begun_never_does(tmp_path: Path) -> None:
    tasks = [(refuse, ("unet",)), *((write_late, (tmp_path / str(number),)) for number in range(6))]
    with pytest.raises(CompileError, match="`unet` is refused") as error:
        list(in_processes(tasks))
    assert error.value.hint == "compile another"
    assert len(list(tmp_path.iterdir())) < 6


def test_a_killed_process_is_told_as_such() -> None:
    with pytest.raises(EnvironmentProblem, match="a process was killed while `die`") as error:
        list(in_processes([(die, ())]))
    assert "out of memory" in error.value.hint


def test_as_many_at_a_time_as_memory_allows() -> None:
    assert jobs_for(1) == len(os.sched_getaffinity(0))
    assert jobs_for(1 << 50) == 1
