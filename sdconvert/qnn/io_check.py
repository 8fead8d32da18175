"""Is what goes into a context, and what comes out, what was exported?"""

from collections.abc import Sequence

from sdconvert.adapters import Tensors
from sdconvert.errors import CompileError
from sdconvert.export.artifact import GraphTensor
from sdconvert.qnn.context import Context


def require_io(context: Context, exported: Sequence[GraphTensor]) -> None:
    """Compare inputs and outputs of a context with those of its graph: names, order, types and shapes.

    Raises:
        CompileError: They differ.
    """
    for kind, compiled in (("input", context.inputs), ("output", context.outputs)):
        wanted = [(one.name, one.dtype, one.shape) for one in exported if one.kind == kind]
        found = [(one.name, one.dtype, one.shape) for one in compiled]
        if found != wanted:
            at = next((n for n, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), len(found))
            raise CompileError(
                f"the {kind}s of `{context.bin.name}` differ from those of its graph from number {at + 1} on: "
                f"{found[at : at + 1]} for {wanted[at : at + 1]}",
                hint="please report this with the versions that `sdconvert doctor` prints",
            )


def require_answers_differ(graph: str, inputs: Sequence[Tensors], answers: Sequence[Tensors]) -> None:
    """Look for a graph that answers the same whatever is asked, as one with a lost input does.

    Raises:
        CompileError: Two different inputs have the same answer, in every output.
    """
    for earlier in range(len(inputs)):
        for later in range(earlier + 1, len(inputs)):
            if not all_equal(inputs[earlier], inputs[later]) and all_equal(answers[earlier], answers[later]):
                raise CompileError(
                    f"the {graph} graph gives the same answer to held-out inputs {earlier + 1} and {later + 1}, "
                    "which differ",
                    hint="an input has lost its way to the outputs: look at the blocks in the report",
                )


def all_equal(one: Tensors, other: Tensors) -> bool:
    """Tell whether two sets of tensors with the same names hold the same bits."""
    return all(one[name].equal(other[name]) for name in one)
