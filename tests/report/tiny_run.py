"""A finished run of small stages: every file is written by the artifact class that reads it, both contexts compiled."""

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from sdconvert.android.artifact import BUNDLE
from sdconvert.android.bundle import Sample, write_bundle
from sdconvert.artifacts import Manifest, RunFolder, describe_outputs
from sdconvert.config import Recipe
from sdconvert.export.artifact import ExportArtifact
from sdconvert.io.degradation import enlarge
from sdconvert.io.files import write_json_atomic
from sdconvert.io.tensors import save_tensors
from sdconvert.qnn.artifact import QnnArtifact
from sdconvert.qnn.context import Context, compile_context
from sdconvert.qnn.fidelity import BlockFidelity
from sdconvert.soc import find_soc

SOCS = ("SM8650", "SM8450")  # their gates differ
GRAPHS = ("unet", "vae_decoder")
RECIPE = Recipe.model_validate({"name": "tiny", "qnn": {"socs": SOCS}, "calibration": {"photographs": ("coffee",)}})

# Quantized at its border and inside, as every exported graph is.
_GRAPH = """
<ir_version: 10, opset_import: ["": 21]>
graph (float[1,3,8,8] sample) => (float[1,3,8,8] out)
<float s = {0.000122072}, uint16 z = {32768}, float u = {0.0000152590}, uint16 o = {0}>
{
    q = QuantizeLinear(sample, s, z)
    x = DequantizeLinear(q, s, z)
    y = Sigmoid(x)
    yq = QuantizeLinear(y, u, o)
    out = DequantizeLinear(yq, u, o)
}
"""


WORST = {"tensor": "mid_block.attentions.0:matmul.1", "entering_db": 83.25, "leaving_db": 41.75}


def write_run(root: Path) -> RunFolder:
    """Write the stages 10 to 70."""
    run = RunFolder(root)
    _write_pictures(run)
    _write_graphs(run)
    contexts = _write_qnn(run)
    sample = torch.linspace(-4, 4, 192).reshape(1, 3, 8, 8)
    answer = {"out": sample.sigmoid()}
    samples = [Sample(graph, graph, {"sample": sample}, answer, dict.fromkeys(SOCS, answer)) for graph in GRAPHS]
    bundle = run.stage_folder("70-android") / BUNDLE
    write_bundle(bundle, model="tiny", contexts=contexts, samples=samples, scheduler={}, metrics={})
    for stage, (settings, metrics) in _manifests().items():
        folder = run.stage_folder(stage)
        Manifest(
            stage=stage,
            fingerprint=stage,
            inputs={},
            outputs=describe_outputs(folder),
            settings=settings,
            versions={"torch": "2.6.0" if stage == "50-export" else "2.7.0", "source of the stage": "0123"},
            metrics=metrics,
            seconds=12.345,
            peak_rss_bytes=3 << 30,
        ).save(folder)
    return run


def _write_pictures(run: RunFolder) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, size in (("chelsea", 24), ("chelsea-tile", 16), ("china", 24), ("china-tile", 16)):
        low = torch.rand(3, size // 4, size // 4, generator=generator)
        fp32 = enlarge(low)

        def noisy(scale: float, like: Tensor = fp32) -> Tensor:
            return (like + scale * torch.randn(like.shape, generator=generator)).clamp(0, 1)

        pictures = {"original": noisy(0.1), "low_resolution": low, "bicubic": noisy(0.05), "fp32": fp32}
        drawn = [("20-calibration", pictures), ("30-quantize", {"quantized": noisy(0.002)})]
        if name.endswith("-tile"):
            drawn.append(("60-qnn", {"simulator": noisy(0.003)}))
        for stage, tensors in drawn:
            (run.stage_folder(stage) / "pictures").mkdir(parents=True, exist_ok=True)
            save_tensors(tensors, run.stage_folder(stage) / "pictures" / f"{name}.safetensors")


def _write_graphs(run: RunFolder) -> None:
    """Weights, layers and ONNX files; the first layer of each graph is exact."""
    exported = ExportArtifact(run.stage_folder("50-export"))
    exported.folder.mkdir()
    run.stage_folder("10-checkpoint").mkdir()
    run.stage_folder("40-mha2sha").mkdir()
    levels = np.random.default_rng(0).uniform(25, 60, 40).tolist()
    for graph in GRAPHS:
        folder = run.stage_folder("30-quantize") / graph
        folder.mkdir()
        save_tensors({"conv.weight": torch.zeros(1000)}, folder / "state_dict_mha.safetensors")
        layers = {f"{graph[:4]}.up_blocks.{place // 8}.conv:conv2d.{place}": db for place, db in enumerate(levels)}
        write_json_atomic({":sample": float("inf"), **layers}, folder / "layer_sqnr_db.json")
        onnx.save(onnx.parser.parse_model(_GRAPH), exported.onnx(graph))
    write_json_atomic(
        {"unet": {"Sigmoid": 7, "MatMul": 5}, "vae_decoder": {"Sigmoid": 8}}, exported.folder / "nodes.json"
    )


def _write_qnn(run: RunFolder) -> list[Context]:
    folder = run.stage_folder("60-qnn")
    onnx_of = ExportArtifact(run.stage_folder("50-export")).onnx
    contexts = [compile_context(onnx_of(graph), folder / soc, find_soc(soc)) for soc in SOCS for graph in GRAPHS]
    figures: dict[str, Any] = {
        graph: {
            soc: {"simulator_vs_fp32_db": 36.1 + 2 * i + j, "simulator_vs_quantized_db": 47.2 - 5 * i + j, "samples": 2}
            for i, soc in enumerate(SOCS)
        }
        for j, graph in enumerate(GRAPHS)
    }
    answer = {"ratio": 0.99, "gain": 0.985, "cosine": 0.995}
    responses = {"text": [answer, answer], "control": [answer | {"ratio": 1.02}]}
    names = [field.name for field in fields(BlockFidelity) if field.name.endswith("_db")]
    levels: dict[str, Any] = {name: 52.5 + place for place, name in enumerate(names)}
    rows = [{"block": block, **levels, "worst_ops": []} for block in ("conv_in", "mid_block", "conv_out")]
    rows[1]["simulator_vs_quantized_db"] = 50.5
    missing = rows[1] | {"simulator_vs_quantized_db": 39.5, "worst_ops": [WORST]}
    fidelity = {"unet": {SOCS[0]: rows, SOCS[1]: [rows[0], missing]}}
    QnnArtifact.write(
        folder, contexts, {"graphs": figures, "fidelity": fidelity, "pictures": {}, "responses": responses}
    )
    return contexts


def _manifests() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Settings and metrics of each stage, under the keys that the stages use."""
    recipe = RECIPE.model_dump(mode="json")

    def parts(*names: str) -> dict[str, Any]:
        return {name: recipe[name] for name in names}

    simulation = {f"{graph}_simulation_vs_fp32_db": 38.5 for graph in GRAPHS}
    exported = {f"{graph}_onnx_vs_{what}_db": 71.25 for graph in GRAPHS for what in ("simulation", "fp32")}
    return {
        "10-checkpoint": (parts("checkpoint"), {"unet_parameters": 2768200}),
        "20-calibration": (
            parts("pipeline", "calibration"),
            {
                "odd": {"nested": [1.25, "<b>text</b>", None]},
                "sizes": {"china": {"requested_px": [15, 24], "processed_px": [16, 24], "tiles": 2}},
                "warnings": ["china: a short side of 15 pixels gives poor results with this model"],
            },
        ),
        "30-quantize": (parts("quantize"), {**simulation, "missed_gates": []}),
        "40-mha2sha": (parts("mha2sha"), {"unet_quantized_sha_vs_mha_db": float("inf")}),
        "50-export": (parts("export"), exported),
        "60-qnn": (parts("qnn"), {"missed_gates": []}),
        "70-android": ({}, {"note": "4 files"}),
    }


def copy_run(run: RunFolder, root: Path) -> RunFolder:
    """Copy a run, for a test that damages it."""
    return RunFolder(shutil.copytree(run.root, root))
