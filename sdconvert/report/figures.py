"""Every figure of a run in one dictionary, read off what the stages left; nothing is computed by a model here."""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sdconvert.android.artifact import AndroidArtifact
from sdconvert.artifacts import Manifest, RunFolder
from sdconvert.config import GatesSection, Recipe
from sdconvert.errors import PreconditionError
from sdconvert.export.artifact import ExportArtifact, Part
from sdconvert.io.files import read_json
from sdconvert.mha2sha.artifact import Mha2ShaArtifact
from sdconvert.qnn.artifact import QnnArtifact
from sdconvert.quantize.artifact import QuantizeArtifact, size_against_quality
from sdconvert.report.bench import bench_figures
from sdconvert.report.pictures import measure_pictures
from sdconvert.soc import find_soc

_PER_SOC = ("simulator_vs_fp32_db", "simulator_vs_quantized_db", "block_simulator_vs_quantized_db")


def collect_figures(
    run: RunFolder,
    recipe: Recipe,
    stages: Sequence[str],
    pictures: Mapping[str, Mapping[str, Tensor]],
    licences: Path,
) -> dict[str, Any]:
    """Return what the report says, as JSON values.

    Args:
        run: Holds the finished stages.
        recipe: Gives the name and the gates.
        stages: Names of the stages to tell of, in their order.
        pictures: Of every held-out crop, as `collect_pictures` gives them.
        licences: Markdown table of the photographs that ship with sdconvert.

    Raises:
        PreconditionError: A stage has not finished.
        UsageError: The recipe names a bench that is none of this run.
    """
    manifests = {stage: _manifest(run, stage) for stage in stages}
    qnn = QnnArtifact(run.stage_folder("60-qnn"))
    exported = ExportArtifact(run.stage_folder("50-export"))
    graphs = exported.graphs()
    quantized = QuantizeArtifact(run.stage_folder("30-quantize"))
    android = AndroidArtifact(run.stage_folder("70-android"))
    accuracy = {graph: _accuracy(graph, manifests, qnn) for graph in graphs}
    measured = {name: measure_pictures(every) for name, every in pictures.items()}
    socs = list(dict.fromkeys(soc for _, soc in qnn.contexts))
    gates = _gates(recipe.gates, accuracy, measured, qnn.figures)
    missed = [text for manifest in manifests.values() for text in manifest.metrics.get("missed_gates", [])]
    return {
        "schema_version": 1,
        "recipe": recipe.name,
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "model": _model(manifests),
        "socs": socs,
        "verdict": {"passed": not missed and all(gate["passed"] for gate in gates), "missed": missed},
        "gates": gates,
        "gate_of": {soc: {measure: _gate_of(recipe.gates, measure, soc) for measure in _PER_SOC} for soc in socs},
        "pictures": measured,
        "accuracy": accuracy,
        "fidelity": qnn.figures["fidelity"],
        "layers": {graph: quantized.layer_sqnr_db(graph) for graph in graphs},
        "rounding": _rounding(graphs, manifests["30-quantize"].metrics, quantized),
        "size_quality": _size_quality(recipe),
        "head_ranges": _head_ranges(Mha2ShaArtifact(run.stage_folder("40-mha2sha"))),
        "contexts": _contexts(qnn),
        "sizes": {graph: _sizes(graph, manifests, exported.parts(graph), qnn) for graph in graphs},
        "bundle": _bundle(android),
        "bench": bench_figures(Path(recipe.report.bench), android) if recipe.report.bench else {},
        "nodes": read_json(run.stage_folder("50-export") / "nodes.json"),
        "stages": {stage: _effort(manifest) for stage, manifest in manifests.items()},
        "photographs": _photographs(manifests["20-calibration"].settings["calibration"], licences),
        "versions": _versions(manifests.values()),
        "metrics": {stage: manifest.metrics for stage, manifest in manifests.items()},
    }


def worst_layers(layers: Mapping[str, float], count: int) -> list[tuple[int, str, float]]:
    """Return place in execution order (from 1), name and SQNR in dB of the tensors that lose most, worst first."""
    ordered = sorted(enumerate(layers.items(), 1), key=lambda item: item[1][1])
    return [(place, name, value) for place, (name, value) in ordered[:count]]


def _manifest(run: RunFolder, stage: str) -> Manifest:
    manifest = run.manifest(stage)
    if manifest is None:
        raise PreconditionError(f"`{run.stage_folder(stage)}` is not finished", hint="run `sdconvert report`")
    return manifest


def _model(manifests: Mapping[str, Manifest]) -> dict[str, Any]:
    quantize = manifests["30-quantize"].settings["quantize"]
    pipeline = manifests["20-calibration"].settings["pipeline"]
    return {
        "checkpoint": manifests["10-checkpoint"].settings["checkpoint"]["path"],
        "weight_bitwidth": quantize["weight_bitwidth"],
        "activation_bitwidth": quantize["activation_bitwidth"],
        "sampling": {key: pipeline[key] for key in ("num_inference_steps", "guidance_scale", "seed", "latent_tile")},
    }


def _accuracy(graph: str, manifests: Mapping[str, Manifest], qnn: QnnArtifact) -> dict[str, Any]:
    """All in dB, the worst output of the worst held-out input each; a graph without attention has no SHA form."""
    simulated, exported = manifests["30-quantize"].metrics, manifests["50-export"].metrics
    return {
        "simulation_vs_fp32_db": simulated[f"{graph}_simulation_vs_fp32_db"],
        "sha_vs_mha_db": manifests["40-mha2sha"].metrics.get(f"{graph}_quantized_sha_vs_mha_db"),
        "onnx_vs_simulation_db": exported[f"{graph}_onnx_vs_simulation_db"],
        "onnx_vs_fp32_db": exported[f"{graph}_onnx_vs_fp32_db"],
        "simulator": qnn.figures["graphs"][graph],
    }


def _gates(
    gates: GatesSection,
    accuracy: Mapping[str, Any],
    pictures: Mapping[str, Mapping[str, Any]],
    simulated: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """One entry per gate: its figure is the worst of all that must reach it. A SoC has the gates of its generation."""
    values: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for measure in _PER_SOC[:2]:
        for graph, row in accuracy.items():
            for soc, scores in row["simulator"].items():
                values[_gate_of(gates, measure, soc)][f"{graph} on {soc}"] = scores[measure]
    for graph, by_soc in simulated["fidelity"].items():
        for soc, rows in by_soc.items():
            blocks = {f"{graph} on {soc}: {row['block']}": row["simulator_vs_quantized_db"] for row in rows}
            values[_gate_of(gates, _PER_SOC[2], soc)] |= blocks
    values["image_psnr_db"] = {name: row["quantized"]["psnr_vs_fp32_db"] for name, row in pictures.items()}
    levels = [_gate(name, getattr(gates, name), "dB", found, lambda level: level) for name, found in values.items()]
    responses = simulated["responses"].items()
    ratios = {f"{kind}, call {n}": one["ratio"] for kind, calls in responses for n, one in enumerate(calls, 1)}
    return [*levels, _gate("response_tolerance", gates.response_tolerance, "ratio", ratios, lambda one: -abs(one - 1))]


def _gate_of(gates: GatesSection, measure: str, soc: str) -> str:
    return gates.key_of(measure, find_soc(soc).arch)


def _gate(
    name: str, wanted: float, unit: str, found: Mapping[str, float], goodness: Callable[[float], float]
) -> dict[str, Any]:
    bound = wanted if unit == "dB" else -wanted
    # NaN is worse than everything, and misses.
    where = min(found, key=lambda one: (goodness(found[one]) >= bound, goodness(found[one])))
    return {
        "gate": name,
        "unit": unit,
        "wanted": wanted,
        "checks": len(found),
        "where": where,
        "worst": found[where],
        "passed": goodness(found[where]) >= bound,
    }


def _rounding(graphs: Iterable[str], metrics: Mapping[str, Any], quantized: QuantizeArtifact) -> dict[str, Any]:
    """Per graph what AdaRound gained, in dB of the worst output on the worst held-out input; empty without AdaRound."""
    found = {}
    for graph in graphs:
        if content := quantized.adaround(graph):
            layers = content["layers"]
            gains = {name: layer["sqnr_db"] - layer["nearest_sqnr_db"] for name, layer in layers.items()}
            found[graph] = {
                "nearest_db": metrics[f"{graph}_nearest_vs_fp32_db"],
                "adaround_db": metrics[f"{graph}_simulation_vs_fp32_db"],
                "layers": len(layers),
                "worse_than_nearest": sum(layer["loss"] > layer["nearest_loss"] for layer in layers.values()),
                "median_gain_db": sorted(gains.values())[len(gains) // 2],
                "forwards": content["forwards"],
                "predicted_peak_bytes": content["predicted_peak_bytes"],
            }
    return found


def _size_quality(recipe: Recipe) -> dict[str, Any]:
    """Predicted dB over bits per weight of all choices, and which of them has the recipe's bits."""
    if recipe.report.sensitivity is None:
        return {}
    choices = size_against_quality(Path(recipe.report.sensitivity))
    quantize = recipe.quantize
    own = {
        (graph, f"{layer}.weight"): given.weight_bitwidth
        for key, given in quantize.layers.items()
        for graph, _, layer in [key.partition(":")]
    }
    bits = {key: own.get(key, quantize.weight_bitwidth) for key in choices[0].bits}
    chosen = next((choice for choice in choices if dict(choice.bits) == bits), None)
    return {
        "points": [(choice.bits_per_weight, choice.predicted_db) for choice in choices],
        "chosen": (chosen.bits_per_weight, chosen.predicted_db) if chosen else None,
    }


def _head_ranges(rewritten: Mha2ShaArtifact) -> dict[str, dict[str, dict[str, float]]]:
    """Per graph, layer and at its output, with the parents' ranges and with the heads' own, where those were taken."""
    every = {graph: rewritten.head_ranges(graph) for graph in rewritten.graphs()}
    return {graph: places for graph, places in every.items() if places}


def _contexts(qnn: QnnArtifact) -> list[dict[str, Any]]:
    return [
        {
            "graph": graph,
            "soc": soc,
            **vars(context.info),
            "cpu_nodes": context.cpu_nodes,
            "compile_seconds": context.seconds,
            "compile_peak_rss_bytes": context.peak_rss_bytes,
            "compile_phases": context.phases,
            "bytes": context.bin.stat().st_size,
        }
        for (graph, soc), context in qnn.contexts.items()
    ]


def _sizes(graph: str, manifests: Mapping[str, Manifest], parts: Sequence[Part], qnn: QnnArtifact) -> dict[str, Any]:
    exported = manifests["50-export"].outputs
    weights = manifests["30-quantize"].outputs[f"{graph}/state_dict_mha.safetensors"]
    onnx = (exported[name].bytes for name in (f"{graph}.onnx", f"{graph}.onnx.data") if name in exported)
    contexts = Counter[str]()
    for (name, soc), context in qnn.contexts.items():
        if name in ([part.name for part in parts] or [graph]):
            contexts[soc] += context.bin.stat().st_size
    return {"weights_fp32_bytes": weights.bytes, "onnx_bytes": sum(onnx), "context_bytes": dict(contexts)}


def _bundle(artifact: AndroidArtifact) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "qairt": manifest.qairt,
        "files": len(manifest.files),
        "samples": len(manifest.samples),
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "tar_bytes": artifact.tar.stat().st_size,
    }


def _effort(manifest: Manifest) -> dict[str, Any]:
    return {
        "seconds": manifest.seconds,
        "peak_rss_bytes": manifest.peak_rss_bytes,
        "files": len(manifest.outputs),
        "bytes": sum(output.bytes for output in manifest.outputs.values()),
    }


def _photographs(calibration: Mapping[str, Any], licences: Path) -> list[dict[str, str]]:
    lines = licences.read_text(encoding="utf-8").splitlines()
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|"))
    # `chelsea.png (held out)` is chelsea; the brackets around addresses are Markdown's.
    shipped = {file.partition(".")[0]: (source, re.sub(r"<(.*?)>", r"\1", author)) for file, source, author in rows}
    found = []
    for key, use in (("held_out", "judged on"), ("photographs", "calibrated on")):
        for name in calibration[key]:
            source, author = shipped.get(name, ("a file of the user", ""))
            found.append({"name": name, "use": use, "source": source, "author": author})
    return found


def _versions(manifests: Iterable[Manifest]) -> dict[str, str]:
    """Distributions by name; where stages ran with different versions, all of them."""
    found: dict[str, dict[str, None]] = {}
    for manifest in manifests:
        for package, version in manifest.versions.items():
            if not package.endswith("of the stage"):
                found.setdefault(package, {})[version] = None
    return {package: ", ".join(found[package]) for package in sorted(found)}
