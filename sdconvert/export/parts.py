"""A graph that is too large for one context, cut into parts that run one after another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from onnx import ModelProto
from onnx.utils import Extractor

from sdconvert.adapters import Tensors
from sdconvert.errors import UsageError
from sdconvert.export.blocks import Block

if TYPE_CHECKING:
    from sdconvert.quantize.artifact import BoundaryTensor


@dataclass(frozen=True)
class Part:
    """Some blocks of a graph that follow one another, as a graph of their own.

    Attributes:
        name: Of the part, `<graph>_<number>` from 1.
        inputs: Keys of the simulation's tensors by name; a graph input's key is `:name`.
        outputs: Keys by name; a tensor has the same name in the part that makes it and in those that read it.
        blocks: Paths of the model's blocks in it.
    """

    name: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class _Cut:
    """A part, and the names that its tensors have in the whole graph."""

    part: Part
    stored: dict[str, str]


def cut_into_parts(
    model: ModelProto, graph: str, blocks: Sequence[Block], before: Sequence[str]
) -> list[tuple[Part, ModelProto]]:
    """Cut a Q/DQ graph; what one part computes twice is what `cut_into_blocks` gives to more than one block.

    Args:
        model: As `graph_for_compiler` makes it.
        graph: Its name.
        blocks: As `cut_into_blocks` cuts it.
        before: Paths of the blocks that begin a new part.

    Raises:
        UsageError: A path is no block, or the first one, before which there is nothing.
    """
    paths = [block.path for block in blocks]
    if odd := [path for path in before if path not in paths[1:]]:
        raise UsageError(
            f"export.split: the {graph} graph cannot be cut before `{odd[0]}`",
            hint=f"it can be cut before {', '.join(paths[1:])}",
        )
    starts = [0, *sorted(paths.index(path) for path in set(before)), len(blocks)]
    members = [blocks[first:last] for first, last in pairwise(starts)]
    outputs = {value.name for value in model.graph.output}
    cuts = [_join(f"{graph}_{number}", own, members[number:], outputs) for number, own in enumerate(members, 1)]
    extractor = Extractor(model)
    return [(cut.part, _extract(extractor, cut)) for cut in cuts]


def _join(name: str, own: Sequence[Block], later: Sequence[Sequence[Block]], graph_outputs: set[str]) -> _Cut:
    made = {key: stored for block in own for key, stored in block.outputs.items()}
    read = {key: stored for block in own for key, stored in block.inputs.items() if key not in made}
    wanted = {key for blocks in later for block in blocks for key in block.inputs}
    left = {key: stored for key, stored in made.items() if key in wanted or stored in graph_outputs}
    inputs = {_name(key, stored, graph_outputs): key for key, stored in read.items()}
    outputs = {_name(key, stored, graph_outputs): key for key, stored in left.items()}
    stored_names = {_name(key, stored, graph_outputs): stored for key, stored in (read | left).items()}
    return _Cut(Part(name, inputs, outputs, tuple(block.path for block in own)), stored_names)


def _name(key: str, stored: str, graph_outputs: set[str]) -> str:
    """Of a tensor between parts, or at the graph's border, where names stay."""
    if stored in graph_outputs or key.startswith(":"):
        return stored
    return "".join(letter if letter.isalnum() else "_" for letter in key)


def _extract(extractor: Extractor, cut: _Cut) -> ModelProto:
    part = extractor.extract_model(
        *([cut.stored[name] for name in side] for side in (cut.part.inputs, cut.part.outputs))
    )
    renamed = {stored: name for name, stored in cut.stored.items()}
    for node in part.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = renamed.get(name, name)
    for value in (*part.graph.input, *part.graph.output, *part.graph.value_info):
        value.name = renamed.get(value.name, value.name)
    part.graph.name = cut.part.name
    return part


def part_answers(
    part: Part, inputs: Tensors, boundaries: "Mapping[str, BoundaryTensor]"
) -> tuple[Tensors, Tensors, Tensors]:
    """What a part gets, and what it is to answer, for one set of the whole graph's inputs.

    Args:
        part: The part.
        inputs: Of the whole graph.
        boundaries: Of the tensors that leave any part, by key.

    Returns:
        Its inputs as the simulation has them; what fp32 makes of these; what the simulation makes of them.
    """
    given = {f":{name}": tensor for name, tensor in inputs.items()}
    entering = {name: given[key] if key in given else boundaries[key].simulated for name, key in part.inputs.items()}
    fp32 = {name: boundaries[key].fp32_block for name, key in part.outputs.items()}
    return entering, fp32, {name: boundaries[key].simulated for name, key in part.outputs.items()}
