"""Block by block: does the HTP compute what the simulation says, and where does the graph lose what it loses.

Each block of a graph is cut out of the Q/DQ file, compiled, and run twice: on the simulation's tensors, which shows the
block alone, and on what the blocks before it answered, which shows what has gathered until there.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx.utils import Extractor

from sdconvert.adapters import Tensors
from sdconvert.export.artifact import Block, ExportArtifact, OnnxRunner
from sdconvert.metrics import worst_sqnr_db
from sdconvert.qnn.context import FinalizationMode, compile_context
from sdconvert.qnn.gates import worst_block
from sdconvert.qnn.io_check import all_equal
from sdconvert.qnn.simulator import Simulator
from sdconvert.qnn.worst_ops import OpLoss, worst_ops
from sdconvert.soc import Soc


@dataclass(frozen=True)
class BlockFidelity:
    """One block, SQNR in dB of its worst output.

    Attributes:
        block: Path of the module.
        quantized_vs_fp32_db: The block alone: the quantized torch model against fp32, on the same inputs.
        onnx_vs_quantized_db: The same in ONNX Runtime against the quantized model.
        simulator_vs_quantized_db: The same in the HTP simulator.
        simulator_vs_fp32_db: The same in the HTP simulator against fp32.
        cumulated_quantized_vs_fp32_db: All blocks up to this one, quantized against fp32.
        cumulated_simulator_vs_fp32_db: The same in the HTP simulator.
        cumulated_simulator_vs_quantized_db: The same in the HTP simulator against the quantized model.
        worst_ops: Where the block alone loses it; only of the block that agrees least, and only if it misses its gate.
    """

    block: str
    quantized_vs_fp32_db: float
    onnx_vs_quantized_db: float
    simulator_vs_quantized_db: float
    simulator_vs_fp32_db: float
    cumulated_quantized_vs_fp32_db: float
    cumulated_simulator_vs_fp32_db: float
    cumulated_simulator_vs_quantized_db: float
    worst_ops: tuple[OpLoss, ...] = ()


def measure_blocks(
    exported: ExportArtifact,
    graph: str,
    soc: Soc,
    folder: Path,
    gate: float = -math.inf,
    finalization_mode: FinalizationMode = 3,
) -> list[dict[str, Any]]:
    """Compile and run every block of a graph for a SoC; a task for a process.

    Args:
        exported: Holds the graph.
        graph: Its name.
        soc: Target.
        folder: For files of the blocks, which stay.
        gate: SQNR in dB of the HTP against the quantized model; of a block that misses it the worst ops are looked for.
        finalization_mode: As `compile_context`.

    Returns:
        The fields of a `BlockFidelity` for each block, in execution order.

    Raises:
        CompileError: As `compile_context`.
    """
    folder.mkdir(parents=True)
    extractor = Extractor(onnx.load(exported.onnx(graph)))
    tensors = exported.boundaries(graph)
    inputs, *_ = exported.answers(graph)[0]
    entering = {f":{name}": tensor for name, tensor in inputs.items()}
    chained = dict(entering)
    found = []
    for number, block in enumerate(exported.blocks(graph)):
        path = folder / f"{graph}_{number:02}.onnx"
        part = extractor.extract_model(list(block.inputs.values()), list(block.outputs.values()))
        onnx.save(part, str(path), save_as_external_data=part.ByteSize() > 1 << 30)
        context = compile_context(path, folder, soc, finalization_mode=finalization_mode)
        simulator = Simulator(context.ctx_onnx)
        given = entering | tensors["simulated"]
        alone = _run(simulator, block, given)
        # A block with nothing but graph inputs before it has been asked already.
        chained |= (
            alone if all_equal({key: chained[key] for key in block.inputs}, given) else _run(simulator, block, chained)
        )
        runtime = _run(OnnxRunner(path), block, given)
        found.append(_compare(block, tensors, alone, chained, runtime))
    rows = [asdict(one) for one in found]
    worst, level = worst_block(rows)
    if not level >= gate:
        block = next(one for one in exported.blocks(graph) if one.path == worst)
        part = extractor.extract_model(list(block.inputs.values()), list(block.outputs.values()))
        named = {name: (entering | tensors["simulated"])[key] for key, name in block.inputs.items()}
        ops = worst_ops(part, named, folder, soc, finalization_mode=finalization_mode)
        next(row for row in rows if row["block"] == worst)["worst_ops"] = [asdict(op) for op in ops]
    return rows


def _run(runner: Simulator | OnnxRunner, block: Block, tensors: Mapping[str, Any]) -> Tensors:
    answer = runner({name: tensors[key] for key, name in block.inputs.items()})
    return {key: answer[name] for key, name in block.outputs.items()}


def _compare(
    block: Block, tensors: Mapping[str, Tensors], alone: Tensors, chained: Tensors, runtime: Tensors
) -> BlockFidelity:
    def worst(reference: Tensors, found: Tensors) -> float:
        return worst_sqnr_db(*({key: those[key] for key in block.outputs} for those in (reference, found)))

    return BlockFidelity(
        block.path,
        worst(tensors["fp32_block"], tensors["simulated"]),
        worst(tensors["simulated"], runtime),
        worst(tensors["simulated"], alone),
        worst(tensors["fp32_block"], alone),
        worst(tensors["fp32"], tensors["simulated"]),
        worst(tensors["fp32"], chained),
        worst(tensors["simulated"], chained),
    )
