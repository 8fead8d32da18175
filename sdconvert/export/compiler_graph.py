"""The graph that the HTP compiler gets: the simulation as ONNX, in the forms that the compiler takes right."""

from onnx import ModelProto

from sdconvert.adapters import Tensors
from sdconvert.export.bias_range import make_room_for_biases
from sdconvert.export.block_biases import adapt_block_biases
from sdconvert.export.factors import quantize_factors
from sdconvert.export.integer_norms import write_norms_on_integers
from sdconvert.export.integer_ops import quantize_silu
from sdconvert.export.onnx_graph import to_onnx
from sdconvert.export.shared_grids import share_grids
from sdconvert.export.transposed_keys import take_keys_as_rows
from sdconvert.quantize.artifact import Simulation


def graph_for_compiler(
    simulation: Simulation, example: Tensors, *, opset: int = 21, keys_as_rows: bool = True
) -> ModelProto:
    """Make the Q/DQ graph of a simulation.

    Args:
        simulation: With ranges; its settings say what its generation of the HTP needs.
        example: One set of graph inputs; their shapes are the model's.
        opset: At least 21, which has 16-bit Q/DQ.
        keys_as_rows: Leave the transposition of attention's keys to their product with the queries.

    Raises:
        SdconvertError: As `to_onnx` and `adapt_block_biases`.
    """
    model = to_onnx(simulation, example, opset=opset)
    adapt_block_biases(model)
    make_room_for_biases(model)
    quantize_factors(model)
    if simulation.settings.integers_only:
        quantize_silu(model)
        write_norms_on_integers(model)
    if keys_as_rows:
        take_keys_as_rows(model)
    share_grids(model)
    return model
