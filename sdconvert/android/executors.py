"""Who answers the calls of a sampling loop: the contexts of a bundle in the simulator, or on a phone."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from sdconvert.android.manifest import GraphRecord

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
