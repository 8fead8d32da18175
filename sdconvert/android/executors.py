"""Who answers the calls of a sampling loop: the contexts of a bundle in the simulator, or on a phone."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from sdconvert.android.manifest import GraphRecord, Manifest

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Answered:
    """Outputs of every call, and how long each took in milliseconds."""

    outputs: list[dict[str, Tensor]]
    times_ms: list[float]


class Executor(Protocol):
    """Answers calls of a graph, many at a time."""

    def execute(self, graph: str, calls: Sequence[Tensors], *, keep: bool) -> Answered:
        """Run a graph on the inputs of every call.

        Args:
            graph: Its name.
            calls: Inputs by the graph's names; what an earlier answer held back is an input as it was given.
            keep: Whether the outputs are only ever inputs of other graphs. They may then be held back: tensors of the
                right shape without content, good until the graph is run again.

        Raises:
            UsageError: Inputs do not fit the graph.
            DeviceError: A device did not do what was asked.
        """


@dataclass
class SimulatorExecutor:
    """Contexts in the simulator on this computer; nothing is held back.

    Args:
        graphs: Of one SoC.
        bundle: Their folder.
        load: Opens an EPContext model.
    """

    graphs: Sequence[GraphRecord]
    bundle: Path
    load: Callable[[Path], Callable[[Tensors], dict[str, Tensor]]]

    def execute(self, graph: str, calls: Sequence[Tensors], *, keep: bool) -> Answered:
        """See `Executor`."""
        context = self.load(self.bundle / next(one.epcontext for one in self.graphs if one.name == graph))
        outputs, times = [], []
        for call in calls:
            begin = time.perf_counter()
            outputs.append(context(call))
            times.append((time.perf_counter() - begin) * 1e3)
        return Answered(outputs, times)


class ChainExecutor:
    """Models that are in several graphs answer as one; what one part hands to the next is held back where it can be.

    Args:
        executor: Of the single graphs.
        manifest: Says which graphs are a model, and what they take.
    """

    def __init__(self, executor: Executor, manifest: Manifest) -> None:
        self._executor = executor
        self._chains = {chain.name: chain for chain in manifest.chains}
        self._graphs = {graph.name: graph for graph in manifest.graphs}

    def execute(self, graph: str, calls: Sequence[Tensors], *, keep: bool) -> Answered:
        """See `Executor`."""
        if graph not in self._chains:
            return self._executor.execute(graph, calls, keep=keep)
        chain, tensors, times = self._chains[graph], [dict(call) for call in calls], [0.0] * len(calls)
        for part in chain.parts:
            record = self._graphs[part]
            own = [{one.name: known[one.name] for one in record.inputs if one.name in known} for known in tensors]
            inside = not any(one.name in chain.outputs for one in record.outputs)
            answered = self._executor.execute(part, own, keep=keep or inside)
            tensors = [known | outputs for known, outputs in zip(tensors, answered.outputs, strict=True)]
            times = [spent + more for spent, more in zip(times, answered.times_ms, strict=True)]
        return Answered([{name: known[name] for name in chain.outputs} for known in tensors], times)
