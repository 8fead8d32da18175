"""The proof of the bare command: the model from the source's own files, on graph inputs that the user names."""

from dataclasses import dataclass
from pathlib import Path

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.calibration.artifact import ActivationStore
from sdconvert.errors import EncodingsError, PreconditionError, UnsupportedModelError, UsageError
from sdconvert.mha2sha.forms import build_mha
from sdconvert.mha2sha.proof import Proof
from sdconvert.mha2sha.source import Source
from sdconvert.quantize.artifact import Simulation, load_simulation


@dataclass(frozen=True)
class SamplesProof:
    """A proof, and why it is one of fp32 alone, if it is."""

    proof: Proof
    unquantized: str | None


def proof_on_samples(files: Source, samples: Path, *, recalibrate: bool, compare: bool = True) -> SamplesProof:
    """Build a source's model and read samples for it, before anything is written.

    The forms are compared on the first sample, the middle one and the last. Ranges per head are taken from all, and
    judged on these three.

    Args:
        files: The source.
        samples: Folder of the inputs of the model's graph, as calibration writes them.
        recalibrate: Take a range per head.
        compare: Run both forms.

    Raises:
        UsageError: The source has no `config.json`, the samples are not of its model's graph, or ranges per head are
            asked for without ranges of the graph.
        PreconditionError: The folder holds no samples, or damaged ones.
        UnsupportedModelError: No family covers the model.
        CheckpointError: Config and weights do not fit each other.
        EncodingsError: Ranges per head are asked for, and those of the graph do not fit it.
    """
    store = ActivationStore(samples)
    if not len(store):
        raise PreconditionError(f"`{samples}` holds no sample", hint="name the folder of one graph")
    adapter = build_mha(files)
    inputs = _chosen(store)
    for one in inputs:
        adapter.require_inputs(one)
    mha, reason = _simulation(files, adapter, inputs[0], recalibrate)
    every = store if recalibrate else None
    return SamplesProof(Proof(adapter, mha, inputs, compare, every, inputs), reason)


def _chosen(store: ActivationStore) -> list[Tensors]:
    places = {0, len(store) // 2, len(store) - 1}
    return [inputs for at, inputs in enumerate(store) if at in places]


def _simulation(
    files: Source, adapter: ModelAdapter, example: Tensors, recalibrate: bool
) -> tuple[Simulation | None, str | None]:
    """The quantized graph, or why there is none."""
    name = f"{adapter.graph_name}.encodings"
    path = next((path for path in files.encodings if path.name == name), None)
    if path is None:
        reason = f"`{files.folder}` holds no {name}"
        if recalibrate:
            raise UsageError(
                f"{reason}, so there are no ranges of activations to take anew",
                hint="give the folder that the quantize stage wrote, or inherit",
            )
        return None, reason
    try:
        return load_simulation(path, adapter, example), None
    except (EncodingsError, UnsupportedModelError) as error:
        if recalibrate:
            raise
        return None, str(error.args[0])
