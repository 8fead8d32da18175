"""A graph that is spared what it was asked before: the simulator takes seconds, and gives the same answer again."""

from collections.abc import Sequence

from sdconvert.adapters import Tensors
from sdconvert.qnn.chain import Runner
from sdconvert.qnn.io_check import all_equal


class Answered:
    """Runs a graph on inputs that are new.

    Args:
        runner: The graph.
        asked: Inputs that it has answered.
        answers: What it answered, in the same order.
    """

    def __init__(self, runner: Runner, asked: Sequence[Tensors], answers: Sequence[Tensors]) -> None:
        self._runner, self._known = runner, list(zip(asked, answers, strict=True))

    def __call__(self, inputs: Tensors) -> Tensors:
        """Answer once; names are the graph's."""
        for asked, answer in self._known:
            if asked.keys() == inputs.keys() and all_equal(asked, inputs):
                return {name: tensor.clone() for name, tensor in answer.items()}
        return self._runner(inputs)
