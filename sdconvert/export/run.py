"""The work of `50-export`: ONNX files, and three answers to every held-out input."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.artifacts import RunFolder
from sdconvert.calibration.artifact import CalibrationArtifact
from sdconvert.checkpoint.artifact import CheckpointArtifact
from sdconvert.config import Recipe
from sdconvert.export.artifact import ExportArtifact, Part
from sdconvert.export.blocks import cut_into_blocks
from sdconvert.export.compiler_graph import graph_for_compiler
from sdconvert.export.float_graph import to_float_onnx
from sdconvert.export.io_manifest import describe_io
from sdconvert.export.needs import bytes_to_export
from sdconvert.export.parts import cut_into_parts, part_answers
from sdconvert.io.encodings import write_encodings
from sdconvert.io.files import write_json_atomic
from sdconvert.metrics import worst_sqnr_db
from sdconvert.mha2sha.artifact import Mha2ShaArtifact
from sdconvert.pipelines.backend import GRAPHS, graph_adapters
from sdconvert.processes import Task, in_processes, jobs_for
from sdconvert.quantize.artifact import QuantizeArtifact, Simulation
from sdconvert.stages import StageContext

_INLINE_BYTES = 1 << 30


def run(context: StageContext) -> dict[str, Any]:
    """Do the stage's work; see `Stage.run`."""
    # The UNet takes longest and comes first, so that no process ends alone.
    order = sorted(GRAPHS, key=lambda graph: graph != "unet")
    tasks: list[Task] = [(export_graph, (context.recipe, context.run, context.out, graph)) for graph in order]
    found: dict[str, tuple[dict[str, float], Mapping[str, int]]] = {}
    context.report.step(0, len(tasks), ", ".join(GRAPHS))
    weights = QuantizeArtifact(context.run.stage_folder("30-quantize")).weight_bytes()
    for index, result in in_processes(
        tasks, jobs_for(bytes_to_export(max(weights.values()), context.recipe.pipeline.latent_tile))
    ):
        found[order[index]] = result
        if len(found) < len(tasks):
            context.report.step(len(found), len(tasks), f"exported {order[index]}")
    write_json_atomic({graph: found[graph][1] for graph in GRAPHS}, context.out / "nodes.json")
    return {name: value for graph in GRAPHS for name, value in found[graph][0].items()}


def export_graph(recipe: Recipe, folder: RunFolder, out: Path, graph: str) -> tuple[dict[str, float], dict[str, int]]:
    """Write one graph's ONNX file and answers; a task for a process.

    Returns:
        How well the file agrees with the simulation and with fp32, in dB; and its nodes by type.
    """
    pipe = CheckpointArtifact(folder.stage_folder("10-checkpoint")).pipeline()
    adapter = graph_adapters(pipe, recipe.pipeline.conditioning_scale)[graph]
    artifact = ExportArtifact(out)
    inputs = CalibrationArtifact(folder.stage_folder("20-calibration")).held_out(graph)
    fp32 = [adapter.run(one) for one in inputs]
    simulation = final_simulation(folder, adapter, inputs[0])
    simulated = [simulation(one) for one in inputs]
    artifact.write_answers(graph, list(zip(inputs, fp32, simulated, strict=True)))
    settings = recipe.export
    model = graph_for_compiler(simulation, inputs[0], opset=settings.opset, keys_as_rows=settings.keys_as_rows)
    if "onnx_encodings" in settings.targets:
        _write_float_graph(simulation, inputs[0], settings.opset, out / "onnx_encodings" / graph)
    artifact.write_io(graph, describe_io(model, graph))
    blocks = cut_into_blocks(model, adapter.block_paths())
    leaving = dict.fromkeys(key for block in blocks for key in block.outputs)
    artifact.write_blocks(graph, blocks, simulation.boundary_tensors(inputs[0], leaving))
    if graph in settings.split:
        parts = cut_into_parts(model, graph, blocks, settings.split[graph])
        _write_parts(artifact, graph, parts, simulation, inputs)
    _save(model, artifact.onnx(graph))
    run_onnx = artifact.runner(graph)
    results = [run_onnx(one) for one in inputs]
    metrics = {
        f"{graph}_onnx_vs_{what}_db": min(map(worst_sqnr_db, references, results))
        for what, references in (("simulation", simulated), ("fp32", fp32))
    }
    return metrics, dict(Counter(node.op_type for node in model.graph.node))


def _write_parts(
    artifact: ExportArtifact,
    graph: str,
    parts: Sequence[tuple[Part, ModelProto]],
    simulation: Simulation,
    inputs: Sequence[Tensors],
) -> None:
    """Write the parts as graphs of their own, with what each is to answer."""
    leaving = [key for part, _ in parts for key in part.outputs.values()]
    boundaries = [simulation.boundary_tensors(one, leaving) for one in inputs]
    for part, model in parts:
        artifact.write_io(part.name, describe_io(model, part.name))
        pairs = zip(inputs, boundaries, strict=True)
        artifact.write_answers(part.name, [part_answers(part, one, tensors) for one, tensors in pairs])
        _save(model, artifact.onnx(part.name))
    artifact.write_parts(graph, [part for part, _ in parts])


def _write_float_graph(simulation: Simulation, example: Tensors, opset: int, stem: Path) -> None:
    stem.parent.mkdir(exist_ok=True)
    model, sections = to_float_onnx(simulation, example, opset=opset)
    _save(model, stem.with_name(f"{stem.name}.onnx"))
    write_encodings(stem.with_name(f"{stem.name}.encodings"), sections)


def _save(model: ModelProto, path: Path) -> None:
    external = model.ByteSize() > _INLINE_BYTES
    onnx.save(model, str(path), save_as_external_data=external, location=f"{path.name}.data")


def final_simulation(folder: RunFolder, adapter: ModelAdapter, example: Tensors) -> Simulation:
    """The simulation of the graph that is shipped: SHA where attention was rewritten."""
    quantized = QuantizeArtifact(folder.stage_folder("30-quantize"))
    rewritten = Mha2ShaArtifact(folder.stage_folder("40-mha2sha"))
    if adapter.graph_name not in rewritten.graphs():
        return quantized.simulation(adapter.graph_name, adapter, example)
    return rewritten.simulation(adapter.graph_name, adapter, example, quantized.settings())
