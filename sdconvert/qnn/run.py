"""The work of `60-qnn`: contexts, scores and simulated pictures."""

import shutil
from collections import Counter, defaultdict
from itertools import product
from typing import Any

from sdconvert.calibration.artifact import TILE, CalibrationArtifact
from sdconvert.config import Recipe
from sdconvert.export.artifact import ExportArtifact
from sdconvert.processes import Task, in_processes, jobs_for
from sdconvert.qnn.artifact import QnnArtifact
from sdconvert.qnn.context import Context
from sdconvert.qnn.contexts import compile_contexts
from sdconvert.qnn.fidelity import measure_blocks
from sdconvert.qnn.gates import BLOCK_MEASURE, MEASURES, gate_of, missed_gates, worst_block, worst_ratio
from sdconvert.qnn.needs import bytes_to_simulate
from sdconvert.qnn.simulate import Road, simulate_answers, simulate_picture, simulate_response, simulate_steps
from sdconvert.soc import find_soc
from sdconvert.stages import StageContext

_BLOCKS = "blocks"
# What pictures and steps begin with is among the held-out inputs of these graphs, and answered when they come to it.
_ASKED_AGAIN = ("vae_encoder", "controlnet", "text_encoder")


def run(context: StageContext) -> dict[str, Any]:
    """Do the stage's work; see `Stage.run`."""
    contexts = compile_contexts(context)
    figures = _simulate(context, contexts)
    QnnArtifact.write(context.out, contexts, figures)
    return _metrics(context.recipe, figures, contexts)


def _simulate(context: StageContext, contexts: list[Context]) -> dict[str, Any]:
    """Run contexts of every SoC on held-out inputs, and those of the first one for pictures and responses."""
    by_soc: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for one in contexts:
        by_soc[one.soc.name][one.graph] = one.ctx_onnx
    for folder in ("pictures", "steps"):
        (context.out / folder).mkdir()
    tasks = _tasks(context, {soc: Road(context.recipe, context.run, paths) for soc, paths in by_soc.items()})
    found: dict[tuple[str, ...], Any] = {}
    keys = sorted(tasks, key=lambda key: key[0] != "graphs" or key[1] not in _ASKED_AGAIN)
    context.report.step(0, len(tasks), "simulate graphs, blocks and pictures")
    for index, result in in_processes(
        [tasks[key] for key in keys], jobs_for(bytes_to_simulate(_largest_set(contexts)))
    ):
        found[keys[index]] = result
        if len(found) < len(tasks):
            context.report.step(len(found), len(tasks), f"simulated {' '.join(keys[index][1:])}")
    shutil.rmtree(context.out / _BLOCKS, ignore_errors=True)
    return _arrange(list(tasks), found)


def _tasks(context: StageContext, roads: dict[str, Road]) -> dict[tuple[str, ...], Task]:
    """All that is to be simulated, by kind; the longest come first, so that no process ends alone."""
    first, data = next(iter(roads.values())), CalibrationArtifact(context.run.stage_folder("20-calibration"))
    exported, qnn = ExportArtifact(context.run.stage_folder("50-export")), context.recipe.qnn
    tasks: dict[tuple[str, ...], Task] = {}
    for graph, soc in product(dict.fromkeys(qnn.fidelity), roads):
        folder = context.out / _BLOCKS / soc / graph
        gate = gate_of(context.recipe.gates, BLOCK_MEASURE, soc)
        tasks["fidelity", graph, soc] = (
            measure_blocks,
            (exported, graph, find_soc(soc), folder, gate, qnn.finalization_mode),
        )
    for name in data.pictures():
        if name.endswith(TILE):
            tasks["pictures", name] = (simulate_picture, (first, name, context.out / f"pictures/{name}.safetensors"))
    # One picture says what each step loses; its steps take the simulator as long as the picture.
    for name in [name for kind, name, *_ in tasks if kind == "pictures"][:1]:
        tasks["steps", name] = (simulate_steps, (first, name, context.out / f"steps/{name}.safetensors"))
    for call in range(len(data.held_out("controlnet"))):
        tasks["responses", str(call)] = (simulate_response, (first, call))
    for soc, road in roads.items():
        for name in road.graphs():
            tasks["graphs", name, soc] = (simulate_answers, (road, name))
    return tasks


def _largest_set(contexts: list[Context]) -> int:
    """Bytes of all contexts of the SoC that has most."""
    sizes: Counter[str] = Counter()
    for one in contexts:
        sizes[one.soc.name] += one.bin.stat().st_size
    return max(sizes.values())


def _arrange(keys: list[tuple[str, ...]], found: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """Results by kind, in the order in which they were asked for."""
    graphs: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    fidelity: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    pictures, steps = dict[str, Any](), dict[str, Any]()
    responses = defaultdict[str, list[dict[str, float]]](list)
    for key in keys:
        match key:
            case ("graphs", graph, soc):
                graphs[graph][soc] = found[key]
            case ("fidelity", graph, soc):
                fidelity[graph][soc] = found[key]
            case ("pictures", name):
                pictures[name] = found[key]
            case ("steps", name):
                steps[name] = found[key]
            case _:
                for kind, calls in found[key].items():
                    responses[kind] += calls
    return {
        "graphs": dict(graphs),
        "fidelity": dict(fidelity),
        "pictures": pictures,
        "steps": steps,
        "responses": dict(responses),
    }


def _metrics(recipe: Recipe, found: dict[str, Any], contexts: list[Context]) -> dict[str, Any]:
    worst = {
        f"{graph}_{soc}_{measure}": scores[measure]
        for measure in MEASURES
        for graph, by_soc in found["graphs"].items()
        for soc, scores in by_soc.items()
    }
    blocks = {
        f"{graph}_{soc}_worst_block_db": worst_block(rows)[1]
        for graph, by_soc in found["fidelity"].items()
        for soc, rows in by_soc.items()
    }
    lowest = min(value for key, value in worst.items() if key.endswith("vs_fp32_db"))
    pictures = {
        f"{name}_simulator_vs_fp32_psnr_db": score["simulator_vs_fp32_psnr_db"]
        for name, score in found["pictures"].items()
    }
    return {
        **worst,
        **blocks,
        **{f"{kind}_response_ratio": worst_ratio(calls) for kind, calls in found["responses"].items()},
        **pictures,
        "cpu_nodes": sum(one.cpu_nodes for one in contexts),
        "missed_gates": missed_gates(recipe.gates, found),
        "note": f"{len(contexts)} contexts, 0 nodes on the CPU, simulator vs fp32 ≥ {lowest:.1f} dB",
    }
