"""Several runs of a pipeline that wait for each other at every model call, so that calls of one graph become one.

Loading a graph on a device takes longer than running it. The sampling code stays the pipeline's own: each run has a
thread, which stops where it calls a graph; once all have stopped, their calls are answered together.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from sdconvert.adapters import Tensors
from sdconvert.pipelines.backend import GraphRunner

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass
class Request:
    """One call of a graph that waits for its answer."""

    owner: str
    """The run that it belongs to."""
    graph: str
    inputs: Tensors
    answer: Tensors | None = None


Execute = Callable[[str, Sequence[Request]], Sequence[Tensors]]
"""Answers all calls of the named graph, in their order."""


class _AbortedError(Exception):
    """Ends a run whose call will have no answer, for another one failed."""


@dataclass
class _Group:
    """Threads that somebody waits for."""

    futures: list[Future[Any]] = field(default_factory=list)
    open: int = 0


class Lockstep:
    """Runs of which none goes on before all have come to a model call.

    Args:
        execute: Answers calls; it is only ever called in the thread of `run`.
    """

    def __init__(self, execute: Execute) -> None:
        self._execute = execute
        self._changed = threading.Condition()
        self._busy = 0  # threads that neither wait for an answer nor for others
        self._waiting: list[Request] = []
        self._aborted = False
        self._thread = threading.local()

    def runner(self, graph: str) -> GraphRunner:
        """What stands in for a graph in a pipeline; to be called inside `run`."""

        def ask(inputs: Tensors) -> Tensors:
            request = Request(self._thread.owner, graph, inputs)
            with self._changed:
                self._waiting.append(request)
                self._busy -= 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: request.answer is not None or self._aborted)
                if request.answer is None:
                    raise _AbortedError
                return request.answer

        return ask

    def each(self, function: Callable[[_Item], _Result], items: Iterable[_Item], /) -> Iterable[_Result]:
        """See `Each`: all items at once, as part of the run that asks."""
        works = [_bound(function, item) for item in items]
        if len(works) == 1:
            return [works[0]()]
        owner = self._thread.owner
        group = self._start([(owner, work) for work in works])
        with self._changed:
            self._busy -= 1
            self._changed.notify_all()
            # The last of the group leaves its place to this thread.
            self._changed.wait_for(lambda: not group.open)
        return _results(group)

    def run(self, works: Mapping[str, Callable[[], _Result]]) -> list[_Result]:
        """Do every work, by owner, in a thread of its own, and return their results in order.

        Raises:
            Exception: Whatever the first of them, or `execute`, raised.
        """
        self._aborted, self._busy, self._waiting = False, 0, []
        group = self._start(works.items())
        try:
            while self._next_batch():
                graph = self._waiting[0].graph
                batch = [request for request in self._waiting if request.graph == graph]
                answers = self._execute(graph, batch)
                with self._changed:
                    for request, answer in zip(batch, answers, strict=True):
                        request.answer = answer
                    self._waiting = [request for request in self._waiting if request.graph != graph]
                    self._busy += len(batch)
                    self._changed.notify_all()
        except BaseException:
            with self._changed:
                self._aborted = True
                self._changed.notify_all()
            raise
        finally:
            with self._changed:
                self._changed.wait_for(lambda: not group.open)
        return _results(group)

    def _next_batch(self) -> bool:
        """Wait until every thread waits; tell whether any of them waits for an answer."""
        with self._changed:
            self._changed.wait_for(lambda: self._busy <= 0 or self._aborted)
            return bool(self._waiting) and not self._aborted

    def _start(self, works: Collection[tuple[str, Callable[[], Any]]]) -> _Group:
        group, nested = _Group(open=len(works)), hasattr(self._thread, "owner")
        with self._changed:
            self._busy += len(works)
        pool = ThreadPoolExecutor(max_workers=max(1, len(works)))
        group.futures = [pool.submit(self._do, owner, work, group, nested) for owner, work in works]
        pool.shutdown(wait=False)
        return group

    def _do(self, owner: str, work: Callable[[], Any], group: _Group, nested: bool) -> Any:
        self._thread.owner = owner
        done = False
        try:
            # Whether gradients are recorded is each thread's own affair.
            with torch.no_grad():
                result = work()
            done = True
            return result
        finally:
            with self._changed:
                self._aborted |= not done
                group.open -= 1
                # Who waits for a group goes on with the last of it.
                self._busy -= 1 if group.open or not nested else 0
                self._changed.notify_all()


def _bound(function: Callable[[_Item], _Result], item: _Item) -> Callable[[], _Result]:
    return lambda: function(item)


def _results(group: _Group) -> list[Any]:
    errors = [error for future in group.futures if (error := future.exception())]
    if errors:
        # A run that was ended for another one's failure says nothing of its own.
        raise next((error for error in errors if not isinstance(error, _AbortedError)), errors[0])
    return [future.result() for future in group.futures]
