"""The page and the JSON file of a finished run: complete, equal in what they say, and in need of nothing else."""

import json
import math
import re
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_report import Report, make_report
from tiny_run import GRAPHS, RECIPE, SOCS, copy_run

from sdconvert.artifacts import RunFolder
from sdconvert.calibration.artifact import CalibrationArtifact
from sdconvert.config import GatesSection
from sdconvert.errors import PreconditionError
from sdconvert.export.artifact import ExportArtifact, Part
from sdconvert.io.tensors import load_tensors, save_tensors
from sdconvert.metrics import psnr_db, psnr_y, ssim_y
from sdconvert.qnn.artifact import QnnArtifact
from sdconvert.report.stage import ReportStage

NUMBERS = {"Infinity", "-Infinity", "NaN"}
MAY_STAY_OPEN = {"meta", "img", "br", "th", "td"}  # as HTML allows


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from leaves(child)
    else:
        yield value


def test_every_figure_of_the_json_file_stands_in_the_page(report: Report) -> None:
    figures = json.loads(report.artifact.json.read_text(encoding="utf-8"))
    assert len(list(leaves(figures["pictures"]))) == 2 * (4 * 2 + 1) + 2 * (5 * 2 + 2)
    del figures["schema_version"]
    numbers = [x for x in leaves(figures) if type(x) in (int, float) or x in NUMBERS]
    assert len(numbers) > 200
    assert {json.dumps(x).strip('"') for x in numbers} - report.page.values() == set()
    text = " ".join(report.page.text.split())
    assert [x for x in leaves(figures) if isinstance(x, str) and x not in NUMBERS and x not in text] == []


def test_page_refers_to_nothing_outside(report: Report) -> None:
    html = report.artifact.html.read_text(encoding="utf-8")
    names = {tag for tag, _ in report.page.tags}
    assert names.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "a"})
    for _, attributes in report.page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "poster"):
                assert value
                assert value.startswith(("data:image/png;base64,", "#"))
            assert "//" not in (value or "") or name == "src"
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}


def test_page_is_well_formed(report: Report) -> None:
    assert {tag: count for tag, count in report.page.open.items() if count and tag not in MAY_STAY_OPEN} == {}
    html = report.artifact.html.read_text(encoding="utf-8")
    assert html.startswith("<!DOCTYPE html>")
    ids = Counter(re.findall(r' id="([^"]+)"', html))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', html))
    assert used == set(ids)
    assert set(ids.values()) == {1}


def test_figures_are_those_of_the_stages(report: Report, finished: RunFolder) -> None:
    figures = report.artifact.figures()
    assert figures["socs"] == list(SOCS)
    assert figures["accuracy"]["unet"] == {
        "simulation_vs_fp32_db": 38.5,
        "sha_vs_mha_db": math.inf,
        "onnx_vs_simulation_db": 71.25,
        "onnx_vs_fp32_db": 71.25,
        "simulator": QnnArtifact(finished.stage_folder("60-qnn")).figures["graphs"]["unet"],
    }
    assert figures["accuracy"]["vae_decoder"]["sha_vs_mha_db"] is None
    assert figures["layers"]["unet"][":sample"] == math.inf
    assert [(one["graph"], one["soc"], one["arch"]) for one in figures["contexts"]] == [
        (graph, soc, arch) for soc, arch in zip(SOCS, (75, 69), strict=True) for graph in GRAPHS
    ]
    assert figures["sizes"]["unet"]["weights_fp32_bytes"] > 4000
    assert figures["stages"]["60-qnn"]["seconds"] == 12.345
    assert figures["versions"] == {"torch": "2.7.0, 2.6.0"}
    assert {row["name"]: row["author"] for row in figures["photographs"]}["china"].endswith("; CC BY 2.0")
    assert report.metrics == {"report": "80-report/report.html", "note": "7 of 7 gates passed"}


def test_parts_of_a_graph_count_together(finished: RunFolder, tmp_path: Path) -> None:
    run = copy_run(finished, tmp_path / "run")
    exported = ExportArtifact(run.stage_folder("50-export"))
    exported.write_parts("unet", [Part(name, {}, {}, ()) for name in ("unet_1", "unet_2")])
    path = run.stage_folder("60-qnn") / "qnn.json"
    content = json.loads(path.read_text())
    records = content["contexts"]
    whole = [record for record in records if record["graph"] == "unet"]
    parts = [record | {"graph": part} for record in whole for part in ("unet_1", "unet_2")]
    content["contexts"] = [record for record in records if record["graph"] != "unet"] + parts
    path.write_text(json.dumps(content))
    before = QnnArtifact(finished.stage_folder("60-qnn")).contexts
    found = make_report(run).artifact.figures()["sizes"]
    for soc in SOCS:
        assert found["unet"]["context_bytes"][soc] == 2 * before["unet", soc].bin.stat().st_size
        assert found["vae_decoder"]["context_bytes"][soc] == before["vae_decoder", soc].bin.stat().st_size


def test_d12_sizes_and_warnings_of_the_calibration_stand_in_the_page(report: Report) -> None:
    metrics = report.artifact.figures()["metrics"]["20-calibration"]
    assert metrics["sizes"]["china"] == {"requested_px": [15, 24], "processed_px": [16, 24], "tiles": 2}
    html = report.artifact.html.read_text(encoding="utf-8")
    assert "china: a short side of 15 pixels gives poor results with this model" in html
    for key in ("requested_px", "processed_px"):
        assert key in html


def test_captions_are_measured_on_the_pictures(report: Report, finished: RunFolder) -> None:
    crop = CalibrationArtifact(finished.stage_folder("20-calibration")).pictures()["china-tile"]
    drawn = QnnArtifact(finished.stage_folder("60-qnn")).pictures()["china-tile"]
    figures = report.artifact.figures()["pictures"]["china-tile"]
    assert figures["simulator"] == {
        "psnr_y_db": psnr_y(crop["original"], drawn),
        "ssim_y": ssim_y(crop["original"], drawn),
        "psnr_vs_fp32_db": psnr_db(crop["fp32"], drawn, data_range=1.0),
    }
    assert figures["fp32"].keys() == {"psnr_y_db", "ssim_y"}


def test_pictures_of_the_page_are_the_files(report: Report) -> None:
    shown = [attributes for tag, attributes in report.page.tags if tag == "img"]
    files = {path.read_bytes() for path in (report.artifact.folder / "pictures").iterdir()}
    assert len(files) == 2 * 5 + 2 * 6
    assert {b64decode((one["src"] or "").partition(",")[2]) for one in shown} == files
    assert [one["alt"] for one in shown][5:11] == [
        f"chelsea-tile, {kind}"
        for kind in ("low resolution", "bicubic", "fp32", "quantized", "HTP simulator", "original")
    ]


def test_text_of_the_stages_is_no_markup(report: Report) -> None:
    assert "1.25; <b>text</b>; None" in " ".join(report.page.text.split())


def test_no_latency_is_stated(report: Report) -> None:
    assert "No latency is stated" in report.page.text
    assert re.findall(r"\d ?(?:ms|µs|cycles)\b", report.page.text) == []


def test_a_gate_that_is_missed_shows_where(finished: RunFolder, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"gates": GatesSection(simulator_vs_fp32_db=36.5)})
    report = make_report(copy_run(finished, tmp_path / "run"), recipe)
    figures = report.artifact.figures()
    assert figures["verdict"] == {"passed": False, "missed": []}
    assert figures["gates"][0] == {
        "gate": "simulator_vs_fp32_db",
        "unit": "dB",
        "wanted": 36.5,
        "checks": 4,
        "where": "unet on SM8650",
        "worst": 36.1,
        "passed": False,
    }
    assert "✗ gates missed" in report.page.text
    assert report.metrics["note"] == "6 of 7 gates passed"


def test_a_weak_answer_to_the_control_image_misses_its_gate(finished: RunFolder, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"gates": GatesSection(response_tolerance=0.015)})
    report = make_report(copy_run(finished, tmp_path / "run"), recipe)
    gate = report.artifact.figures()["gates"][6]
    assert gate == {
        "gate": "response_tolerance",
        "unit": "ratio",
        "wanted": 0.015,
        "checks": 3,
        "where": "control, call 1",
        "worst": 1.02,
        "passed": False,
    }
    assert "1 ± 0.015" in report.page.text
    assert "1.020" in report.page.text


def test_a_picture_that_is_not_a_number_misses_its_gate(finished: RunFolder, tmp_path: Path) -> None:
    run = copy_run(finished, tmp_path / "run")
    path = run.stage_folder("30-quantize") / "pictures" / "china.safetensors"
    save_tensors({"quantized": load_tensors(path)["quantized"] * math.nan}, path)
    gates = make_report(run).artifact.figures()["gates"]
    assert [gate["passed"] for gate in gates] == [*[True] * 5, False, True]
    assert (gates[5]["where"], math.isnan(gates[5]["worst"])) == ("china", True)


def test_every_soc_is_judged_by_the_gates_of_its_generation(report: Report) -> None:
    figures = report.artifact.figures()
    found = {gate["gate"]: (gate["wanted"], gate["where"], gate["worst"], gate["checks"]) for gate in figures["gates"]}
    assert found["simulator_vs_quantized_db"] == (45.0, "unet on SM8650", 47.2, 2)
    assert found["simulator_vs_quantized_before_v73_db"] == (40.0, "unet on SM8450", 42.2, 2)
    assert found["block_simulator_vs_quantized_db"] == (50.0, "unet on SM8650: mid_block", 50.5, 3)
    assert found["block_simulator_vs_quantized_before_v73_db"] == (38.0, "unet on SM8450: mid_block", 39.5, 2)
    assert set(figures["gate_of"]) == set(SOCS)
    assert "✗" not in report.page.text


def remove_pictures(run: RunFolder) -> None:
    for path in (run.stage_folder("20-calibration") / "pictures").iterdir():
        path.unlink()


def remove_quantized(run: RunFolder) -> None:
    (run.stage_folder("30-quantize") / "pictures" / "china.safetensors").unlink()


def remove_simulated(run: RunFolder) -> None:
    (run.stage_folder("60-qnn") / "pictures" / "chelsea-tile.safetensors").unlink()


def remove_manifest(run: RunFolder) -> None:
    (run.stage_folder("50-export") / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_pictures, "20-calibration` holds no pictures"),
        (remove_quantized, "`30-quantize` holds no picture of `china`; found chelsea"),
        (remove_simulated, "`60-qnn` holds no picture of `chelsea-tile`; found china-tile"),
        (remove_manifest, "50-export` is not finished"),
    ],
)
def test_what_is_missing_is_named(
    damage: Callable[[RunFolder], None], message: str, finished: RunFolder, tmp_path: Path
) -> None:
    run = copy_run(finished, tmp_path / "run")
    damage(run)
    with pytest.raises(PreconditionError, match=re.escape(message)):
        make_report(run)


def test_stage_reads_files_that_exist() -> None:
    assert [path for path in ReportStage().inputs(RECIPE).values() if not path.is_file()] == []
