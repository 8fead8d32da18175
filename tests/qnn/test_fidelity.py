"""Blocks on the HTP, one by one and in a chain, against the whole graph."""

from pathlib import Path

import onnx
import pytest
import torch
from blocks_case import PATHS, skipping_case, skipping_onnx

from sdconvert.export.artifact import ExportArtifact
from sdconvert.export.blocks import cut_into_blocks
from sdconvert.metrics import worst_sqnr_db
from sdconvert.qnn.context import compile_context
from sdconvert.qnn.fidelity import measure_blocks
from sdconvert.qnn.simulator import Simulator
from sdconvert.soc import find_soc


def test_blocks_in_a_chain_compute_what_the_whole_graph_computes(tmp_path: Path) -> None:
    case, simulation = skipping_case()
    inputs, artifact, soc = case.samples[0], ExportArtifact(tmp_path), find_soc("SM8650")
    fp32, simulated = case.adapter.run(inputs), simulation(inputs)
    model = skipping_onnx()
    blocks = cut_into_blocks(model, PATHS)
    artifact.write_answers("module", [(inputs, fp32, simulated)])
    artifact.write_blocks("module", blocks, simulation.boundary_tensors(inputs, [k for b in blocks for k in b.outputs]))
    onnx.save(model, str(artifact.onnx("module")))
    rows = measure_blocks(artifact, "module", soc, tmp_path / "blocks", gate=200.0)
    whole = Simulator(compile_context(artifact.onnx("module"), tmp_path / "whole", soc).ctx_onnx)(inputs)
    assert [row["block"] for row in rows] == list(PATHS)
    for row in rows:
        assert row["onnx_vs_quantized_db"] >= 70
        assert row["simulator_vs_quantized_db"] >= 60
        assert row["simulator_vs_fp32_db"] == pytest.approx(row["quantized_vs_fp32_db"], abs=0.5)
    worst = min(rows, key=lambda row: row["simulator_vs_quantized_db"])
    assert [row["block"] for row in rows if row["worst_ops"]] == [worst["block"]]
    # What stands between blocks belongs to the one behind it.
    assert {op["tensor"].partition(":")[0].partition(".")[0] for op in worst["worst_ops"]} <= {worst["block"], ""}
    last = rows[-1]
    assert last["cumulated_quantized_vs_fp32_db"] == pytest.approx(worst_sqnr_db(fp32, simulated))
    assert last["cumulated_simulator_vs_fp32_db"] == pytest.approx(worst_sqnr_db(fp32, whole), abs=0.1)
    assert last["cumulated_simulator_vs_quantized_db"] == pytest.approx(worst_sqnr_db(simulated, whole), abs=3)
    assert torch.isfinite(whole["y"]).all()
