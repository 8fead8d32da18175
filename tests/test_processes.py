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


def meet(folder: Path, number: int, count: int) -> int:
    (folder / str(number)).touch()
    end = time.monotonic() + 60
    while len(list(folder.iterdir())) < count:
        assert time.monotonic() < end, "the others never came"
        time.sleep(0.01)
    return os.getpid()


def hold(size: int) -> None:
    ring: list[object] = [b"x" * size]
    ring.append(ring)  # only a collection finds it


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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


def test_a_process_has_one_thread_and_takes_task_after_task() -> None:
    ((pid, threads),) = {result for _, result in in_processes([(where, ())] * 2, jobs=1)}
    assert (pid != os.getpid(), threads) == (True, 1)


def test_as_many_tasks_run_at_once_as_there_are_jobs(tmp_path: Path) -> None:
    found = dict(in_processes([(meet, (tmp_path, number, 2)) for number in range(2)], jobs=2))
    assert len({*found.values(), os.getpid()}) == 3


def test_what_a_task_held_is_free_when_the_next_begins() -> None:
    before, _, after = (result for _, result in in_processes([(resident, ()), (hold, (1 << 28,)), (resident, ())], 1))
    assert after - before < 1 << 26


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
