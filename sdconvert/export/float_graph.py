"""A graph without Q/DQ nodes and an encodings file beside it, as converters of the QAIRT SDK take a model."""

from typing import Any

from onnx import ModelProto

from sdconvert.adapters import Tensors
from sdconvert.export.marked import export_marked, finish, markers
from sdconvert.quantize.artifact import SECOND, Simulation


def to_float_onnx(simulation: Simulation, example: Tensors, *, opset: int) -> tuple[ModelProto, dict[str, Any]]:
    """Make ONNX of a simulation, and its ranges by the names of that graph's tensors.

    A tensor has one entry: what the second operand of a MatMul has beside it on v73 and later, a grid of its own with
    all 16 bits, has no place in this form.

    Args:
        simulation: With ranges.
        example: One set of graph inputs; their shapes are the model's.
        opset: Of the ONNX operators.

    Returns:
        The model, and the sections of an encodings file of form 0.6.1.

    Raises:
        PreconditionError: The simulation has no ranges.
    """
    encodings = simulation.encodings()
    model = export_marked(simulation, example, opset)
    activations: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    for key, marker in markers(model.graph):
        source, made = marker.inputs[0], marker.outputs[0]
        assert source is not None  # a marker has one input
        name = str(source.name)
        if made.is_graph_output():
            source.name = name = str(made.name)
        if key in encodings.parameters:
            parameters.setdefault(name, encodings.parameters[key])
        elif not key.endswith(SECOND):
            activations.setdefault(name, encodings.activations[key])
        made.replace_all_uses_with(source, replace_graph_outputs=True)
        model.graph.remove(marker, safe=True)
    return finish(model), {"activation_encodings": activations, "param_encodings": parameters}
