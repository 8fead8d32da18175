"""Which ops of a part of a graph the HTP computes worst: every stored tensor is made an output and compared."""

import math
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto
from onnx.utils import Extractor

from sdconvert.adapters import Tensors
from sdconvert.export.artifact import OnnxRunner, key_of, nearest_sources
from sdconvert.metrics import sqnr_db
from sdconvert.qnn.context import FinalizationMode, compile_context
from sdconvert.qnn.simulator import Simulator
from sdconvert.soc import Soc


@dataclass(frozen=True)
class OpLoss:
    """What one op loses on the HTP, SQNR in dB against ONNX Runtime on the same inputs.

    Attributes:
        tensor: The op's output, by its key in the simulation: module, op and number.
        entering_db: The worst of the stored tensors that it reads.
        leaving_db: Its output.
    """

    tensor: str
    entering_db: float
    leaving_db: float

    @property
    def added(self) -> float:
        """Noise that the op adds, per energy of its output; infinite where the output is NaN."""
        added = float(10 ** (-self.leaving_db / 10) - 10 ** (-self.entering_db / 10))
        return math.inf if math.isnan(added) else added


def worst_ops(
    model: ModelProto,
    inputs: Tensors,
    folder: Path,
    soc: Soc,
    *,
    count: int = 3,
    finalization_mode: FinalizationMode = 3,
) -> list[OpLoss]:
    """Find the ops that add most noise to what enters them.

    More outputs leave the compiler less to fuse, so the levels may differ from those of the graph as it ships.

    Args:
        model: A Q/DQ graph whose DequantizeLinear nodes carry their tensors' keys.
        inputs: Of the graph, by name.
        folder: For the files of the graph with all outputs, which stay.
        soc: Target.
        count: How many ops.
        finalization_mode: As `compile_context`.

    Returns:
        The worst first.

    Raises:
        CompileError: As `compile_context`.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    # A DequantizeLinear whose integers nothing makes is a weight's.
    keys = {node.output[0]: key for node in model.graph.node if (key := key_of(node)) and node.input[0] in makers}
    path = folder / "all_outputs.onnx"
    part = Extractor(model).extract_model([value.name for value in model.graph.input], list(keys))
    onnx.save(part, str(path), save_as_external_data=part.ByteSize() > 1 << 30)
    context = compile_context(path, folder, soc, finalization_mode=finalization_mode)
    expected, found = OnnxRunner(path)(inputs), Simulator(context.ctx_onnx)(inputs)
    levels = {name: sqnr_db(expected[name], found[name]) for name in keys}
    losses = []
    for name, key in keys.items():
        if makers[makers[name].input[0]].input[0] in inputs:
            continue  # that is no op, but the input's own grid
        entering = [levels[source] for source in nearest_sources(name, makers, levels)]
        losses.append(OpLoss(key, min(entering, default=math.inf), levels[name]))
    return sorted(losses, key=lambda loss: -loss.added)[:count]
