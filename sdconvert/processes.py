"""Tasks in processes beside this one, as many at a time as there are cores and memory for."""

import gc
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sdconvert.errors import EnvironmentProblem
from sdconvert.memory import return_freed_memory

Task = tuple[Callable[..., Any], tuple[Any, ...]]


def in_threads(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[int, Any]]:
    """Run tasks that wait for processes of their own; yield number and result of each as it ends.

    Raises:
        SdconvertError: As the first task that fails.
    """
    with _ending(ThreadPoolExecutor(jobs)) as pool:
        yield from _results(pool, tasks)


def in_processes(tasks: Sequence[Task], jobs: int | None = None) -> Iterator[tuple[int, Any]]:
    """Run tasks in processes with one thread each; yield number and result of each as it ends.

    A process takes the next task when it has finished one, for what tasks import takes longer than many of them. What a
    task held is given back to the system before.

    Args:
        tasks: Functions with their arguments; these and the results must be picklable.
        jobs: How many at a time; one per core if not given.

    Raises:
        EnvironmentProblem: A process was killed.
        SdconvertError: As the first task that fails.
    """
    jobs = jobs or _cores()
    with _ending(ProcessPoolExecutor(jobs, get_context("spawn"), _begin)) as pool:
        yield from _results(pool, tasks)


def _results(pool: Executor, tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
    waiting = {pool.submit(_run, *task): index for index, task in enumerate(tasks)}
    for future in as_completed(waiting):
        try:
            result = future.result()
        except BrokenExecutor as error:
            function, _ = tasks[waiting[future]]
            raise EnvironmentProblem(
                f"a process was killed while `{function.__name__}` or a task beside it ran",
                hint="most of the time that is the system, out of memory: close other programs; finished stages stay",
            ) from error
        yield waiting[future], result


def _run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return function(*arguments)
    finally:
        gc.collect()  # a traced graph holds itself
        return_freed_memory()


@contextmanager
def _ending(pool: Executor) -> Iterator[Executor]:
    """On a failure, or Ctrl-C, tasks that have not begun never do."""
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, which is later
    # Ctrl-C reaches the children too; the parent tells of it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def jobs_for(largest_bytes: int) -> int:
    """How many tasks that take so much memory each may run at once: one per core, as far as the free memory reaches."""
    return max(1, min(_cores(), _available_bytes() // max(1, largest_bytes)))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
