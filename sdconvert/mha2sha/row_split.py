"""The one rename map: which rows of which parameter of the MHA form become which parameter of the SHA form.

With four heads of dimension d:

    parent                       part                               rows
    to_q.weight (4d, C)          to_q_convs.0.weight (d, C, 1, 1)   0 … d
                                 to_q_convs.1.weight (d, C, 1, 1)   d … 2d   and so on
    to_out.0.weight (C, 4d)      to_out.0.weight (C, 4d, 1, 1)      all
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A parameter of the SHA form: rows `start` to `stop` of its parent."""

    name: str
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """The rows, as an index of the parent."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class RowSplit:
    """How one parameter is cut into rows; its parts cover it whole, in order.

    Args:
        layer: Path of the module that is rewritten.
        parent: Key of the whole parameter.
        parts: What it becomes.
        to_convolution: Whether a matrix (rows, C) becomes weights (rows, C, 1, 1) of 1x1 convolutions.
    """

    layer: str
    parent: str
    parts: tuple[Part, ...]
    to_convolution: bool

    @property
    def rows(self) -> int:
        """Rows of the parent."""
        return self.parts[-1].stop

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)

    def part_shape(self, part: Part, parent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a part of a parent of this shape."""
        columns = (*parent_shape[1:], 1, 1) if self.to_convolution else parent_shape[1:]
        return (part.stop - part.start, *columns)


def even_split(layer: str, parent: str, children: list[str], rows: int, to_convolution: bool) -> RowSplit:
    """Cut a parameter into children of equally many rows; the caller has seen that they divide."""
    each = rows // len(children)
    parts = tuple(Part(name, i * each, (i + 1) * each) for i, name in enumerate(children))
    return RowSplit(layer, parent, parts, to_convolution)
