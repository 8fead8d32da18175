"""A simulation's ranges as files that AIMET reads, and back.

AIMET knows tensors as inputs and outputs of modules. A tensor that a leaf module alone makes, once, goes under
`activation_encodings` as that module's output 0. All others (a functional add, MatMul in attention, graph inputs, a
module that is called twice) have no place there and go under `functional_encodings`, which AIMET passes over.
"""

from collections import Counter
from typing import Any

from sdconvert.errors import EncodingsError
from sdconvert.io.encodings import Encoding
from sdconvert.quantize.simulation import Encodings, Simulation


def to_sections(simulation: Simulation) -> dict[str, Any]:
    """The content of `<graph>.encodings`: parameters and activations in AIMET's shape."""
    encodings = simulation.encodings()
    leaves = _leaf_outputs(simulation)
    activations: dict[str, Any] = {}
    functional: dict[str, Any] = {}
    for key, entries in encodings.activations.items():
        path, _, position = key.partition(":")
        if path in leaves:
            activations[path] = {"output": {"0": entries[0]}}
        else:
            functional.setdefault(path, {})[position] = entries[0]
    return {
        "activation_encodings": activations,
        "functional_encodings": functional,
        "param_encodings": encodings.parameters,
    }


def from_sections(sections: dict[str, Any], simulation: Simulation) -> Encodings:
    """The ranges of a file's sections under the keys of a simulation.

    Raises:
        EncodingsError: An activation entry names no module of the graph, or one that is called more than once, or
            holds no range for its output.
    """
    leaves = _leaf_outputs(simulation)
    activations: dict[str, list[Encoding]] = {
        f"{path}:{position}": [entry]
        for path, positions in sections["functional_encodings"].items()
        for position, entry in positions.items()
    }
    for path, places in sections["activation_encodings"].items():
        if path not in leaves:
            graph = simulation.adapter.graph_name
            raise EncodingsError(
                f"activation encodings name `{path}`, which makes no tensor of the {graph} graph",
                hint="were they exported from the same model?",
            )
        match places:
            case {"output": {"0": entry}}:
                activations[leaves[path]] = [entry]
            case _:
                raise EncodingsError(f"`{path}` has no range for its output", hint='expected {"output": {"0": {…}}}')
    return Encodings(sections["param_encodings"], activations)


def _leaf_outputs(simulation: Simulation) -> dict[str, str]:
    """Path of each leaf module that makes exactly one stored tensor → that tensor's key."""
    modules = dict(simulation.adapter.model.named_modules())
    keys = [key for key in simulation.quantizers.activations if not key.startswith(":")]
    counts = Counter(key.partition(":")[0] for key in keys)
    return {
        path: key
        for key in keys
        if counts[path := key.partition(":")[0]] == 1 and path in modules and not any(modules[path].children())
    }
