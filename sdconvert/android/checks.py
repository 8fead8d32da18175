"""What a bundle is refused for before anything is written."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from sdconvert.android.manifest import NAME, SAMPLE_ID
from sdconvert.errors import UsageError
from sdconvert.qnn.artifact import Context

_DTYPES = ("float32", "int32")


@dataclass(frozen=True)
class Sample:
    """One test input of one graph and the answers to it; tensors by the graph's names, float32 NCHW or int32 ids."""

    id: str
    graph: str
    inputs: Mapping[str, torch.Tensor]
    fp32: Mapping[str, torch.Tensor]
    """Outputs of the fp32 model."""
    sim: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    """Outputs of the compiled context in the simulator, by SoC name."""


def check_contexts(contexts: Sequence[Context]) -> None:
    """Refuse contexts that cannot share a bundle.

    Raises:
        UsageError: None at all, several compilers, a gap in graphs x SoCs, or names and dtypes that runners change.
    """
    if not contexts:
        raise UsageError("a bundle needs at least one compiled graph", hint="compile first")
    builds = {context.info.qairt for context in contexts}
    if len(builds) > 1:
        raise UsageError(f"contexts come from QAIRT {' and '.join(sorted(builds))}", hint="compile all with one build")
    counts = Counter((context.graph, context.soc.name) for context in contexts)
    for graph in dict.fromkeys(graph for graph, _ in counts):
        for soc in dict.fromkeys(soc for _, soc in counts):
            if counts[graph, soc] != 1:
                found = f"{counts[graph, soc]} contexts for {soc}"
                raise UsageError(f"graph `{graph}` has {found}", hint="it needs exactly one for every SoC")
    for context in contexts:
        tensors = (*context.inputs, *context.outputs)
        _check_names((context.graph, *(spec.name for spec in tensors)), context.graph)
        other = {spec.name: spec.dtype for spec in tensors if spec.dtype not in _DTYPES}
        if other:
            raise UsageError(
                f"graph `{context.graph}` has tensors {other}", hint=f"a bundle's tensors are {' or '.join(_DTYPES)}"
            )


def check_samples(samples: Sequence[Sample], contexts: Sequence[Context]) -> None:
    """Refuse samples that do not belong to the graphs, or would overwrite each other.

    Raises:
        UsageError: A doubled or unfit id, a graph without sample, a sample without graph, or answers for another SoC.
    """
    doubled = [name for name, count in Counter(sample.id for sample in samples).items() if count > 1]
    if doubled:
        raise UsageError(f"sample ids {doubled} are there more than once", hint="ids are unique over all graphs")
    unfit = [sample.id for sample in samples if not re.fullmatch(SAMPLE_ID, sample.id)]
    if unfit:
        raise UsageError(f"sample ids {unfit} cannot be folder names everywhere", hint="use letters, digits and `_.-`")
    asked, graphs = {sample.graph for sample in samples}, {context.graph for context in contexts}
    if asked != graphs:
        found = f"samples are for {sorted(asked)}, graphs are {sorted(graphs)}"
        raise UsageError(found, hint="every graph needs a sample, and every sample a graph")
    socs = {context.soc.name for context in contexts}
    for sample in samples:
        if set(sample.sim) - socs:
            found = f"sample `{sample.id}` has simulator outputs for {sorted(set(sample.sim) - socs)}"
            raise UsageError(found, hint=f"the bundle is for {', '.join(sorted(socs))}")


def _check_names(names: Iterable[str], graph: str) -> None:
    unfit = [name for name in names if not re.fullmatch(NAME, name)]
    if unfit:
        raise UsageError(
            f"names {unfit} of graph `{graph}` would be rewritten by runners on the device",
            hint="use only letters, digits and `_` for graphs, inputs and outputs",
        )
