"""A graph that was compiled in parts: they run one after another, each on what those before it answered."""

from collections.abc import Callable, Mapping, Sequence

from sdconvert.adapters import Tensors
from sdconvert.export.artifact import Part

Runner = Callable[[Tensors], Tensors]


class Chain:
    """The parts as one graph.

    Args:
        parts: In execution order.
        runners: Of each part, by name.
        outputs: Names of the whole graph's outputs.
    """

    def __init__(self, parts: Sequence[Part], runners: Mapping[str, Runner], outputs: Sequence[str]) -> None:
        self._parts, self._runners, self._outputs = parts, runners, outputs

    def __call__(self, inputs: Tensors) -> Tensors:
        """Run once; names are the whole graph's."""
        tensors = dict(inputs)
        for part in self._parts:
            tensors |= self._runners[part.name]({name: tensors[name] for name in part.inputs})
        return {name: tensors[name] for name in self._outputs}
