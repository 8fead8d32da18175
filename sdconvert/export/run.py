"""The work of `50-export`: ONNX files, and three answers to every held-out input."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnx

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.calibration.artifact import CalibrationArtifact
from sdconvert.checkpoint.artifact import CheckpointArtifact
from sdconvert.export.aimet import to_onnx
from sdconvert.export.artifact import ExportArtifact
from sdconvert.export.block_biases import adapt_block_biases
from sdconvert.export.operands import insert_operand_pairs
from sdconvert.export.transposed_keys import take_keys_as_rows
from sdconvert.io.files import write_json_atomic
from sdconvert.metrics import worst_sqnr_db
from sdconvert.mha2sha.artifact import Mha2ShaArtifact
from sdconvert.pipelines.backend import graph_adapters
from sdconvert.quantize.artifact import QuantizeArtifact, Simulation
from sdconvert.stages import StageContext

_INLINE_BYTES = 1 << 30


def run(context: StageContext) -> dict[str, Any]:
    """Do the stage's work; see `Stage.run`."""
    data = CalibrationArtifact(context.run.stage_folder("20-calibration"))
    adapters = graph_adapters(
        CheckpointArtifact(context.run.stage_folder("10-checkpoint")).pipeline(),
        context.recipe.pipeline.conditioning_scale,
    )
    artifact = ExportArtifact(context.out)
    metrics: dict[str, Any] = {}
    nodes: dict[str, Mapping[str, int]] = {}
    for done, (graph, adapter) in enumerate(adapters.items()):
        context.report.step(done, len(adapters), graph)
        inputs = _held_out(data, graph)
        fp32 = [adapter.run(one) for one in inputs]
        simulation = final_simulation(context, adapter, inputs[0])
        simulated = [simulation(one) for one in inputs]
        artifact.write_answers(graph, list(zip(inputs, fp32, simulated, strict=True)))
        model = to_onnx(simulation, inputs[0], opset=context.recipe.export.opset)
        adapt_block_biases(model)
        insert_operand_pairs(model, simulation.operand_encodings())
        if context.recipe.export.keys_as_rows:
            take_keys_as_rows(model)
        external = model.ByteSize() > _INLINE_BYTES
        onnx.save(model, str(artifact.onnx(graph)), save_as_external_data=external, location=f"{graph}.onnx.data")
        nodes[graph] = Counter(node.op_type for node in model.graph.node)
        run = artifact.runner(graph)
        results = [run(one) for one in inputs]
        for what, references in (("simulation", simulated), ("fp32", fp32)):
            metrics[f"{graph}_onnx_vs_{what}_db"] = min(map(worst_sqnr_db, references, results))
    write_json_atomic(nodes, context.out / "nodes.json")
    return metrics


def final_simulation(context: StageContext, adapter: ModelAdapter, example: Tensors) -> Simulation:
    """The simulation of the graph that is shipped: SHA where attention was rewritten."""
    quantized = QuantizeArtifact(context.run.stage_folder("30-quantize"))
    rewritten = Mha2ShaArtifact(context.run.stage_folder("40-mha2sha"))
    if adapter.graph_name not in rewritten.graphs():
        return quantized.simulation(adapter.graph_name, adapter, example)
    return rewritten.simulation(adapter.graph_name, adapter, example, quantized.settings())


def _held_out(data: CalibrationArtifact, graph: str) -> list[Tensors]:
    """One input per held-out photograph: its first step, the next one's last, and so on, so that both kinds occur."""
    store = data.evaluation(graph)
    by_picture: dict[str, list[Tensors]] = {}
    for info, inputs in store.samples():
        by_picture.setdefault(info.picture, []).append(inputs)
    return [samples[-(index % 2)] for index, samples in enumerate(by_picture.values())]
