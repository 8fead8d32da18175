"""What the report tells of a bench of its bundle: all its figures, a plot of every time; no time of the simulator."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_report import make_report
from tiny_run import GRAPHS, RECIPE

from sdconvert.android.artifact import AndroidArtifact
from sdconvert.android.bench import bench
from sdconvert.android.measure import Job
from sdconvert.android.runners import SimulatorRunner
from sdconvert.android.timing import Plan
from sdconvert.artifacts import RunFolder
from sdconvert.config import Recipe, ReportSection
from sdconvert.errors import UsageError
from sdconvert.io.files import read_json, write_json_atomic
from sdconvert.qnn.simulator import Simulator


def recipe(folder: Path) -> Recipe:
    return RECIPE.model_copy(update={"report": ReportSection(bench=str(folder / "bench.json"))})


@pytest.fixture(scope="module")
def simulated(finished: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of the run's own bundle, by the simulator."""
    android = AndroidArtifact(finished.stage_folder("70-android"))
    folder = tmp_path_factory.mktemp("bench")
    bench([Job(android.bundle, android.manifest, SimulatorRunner("SM8650", Simulator))], [folder], Plan(inferences=3))
    return folder


def as_of_a_device(result: dict[str, Any]) -> dict[str, Any]:
    """The result as a phone would have given it: its times are no device's, and this is no report for anybody."""
    for graph in result["graphs"]:
        graph["latency"] = {"QNN execute": graph["latency"].pop("simulator") | {"p50_ms": 79.25, "rounds": [2, 1]}}
    image = {"seconds": 2.125, "steps": 20, "formula": "20 x (unet) + vae_decoder"}
    device = {"model": "Rig <7>", "android": "15"}
    return result | {"is_device": True, "runner": "qnn-net-run", "device": device, "image": image, "notes": []}


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict | list):
        return [leaf for child in (value.values() if isinstance(value, dict) else value) for leaf in leaves(child)]
    return [value]


def test_every_figure_of_a_device_stands_in_the_page(finished: RunFolder, simulated: Path, tmp_path: Path) -> None:
    result = as_of_a_device(read_json(simulated / "bench.json"))
    result["graphs"][1]["invalid"] = "thermal status 2"
    write_json_atomic(result, tmp_path / "bench.json")
    report = make_report(finished, recipe(tmp_path))
    told = json.loads(report.artifact.json.read_text(encoding="utf-8"))["bench"]
    numbers = {json.dumps(x).strip('"') for x in leaves(told) if type(x) in (int, float) or x == "Infinity"}
    assert len(numbers) > 20
    assert numbers - report.page.values() == set()
    text = " ".join(report.page.text.split())
    assert "On the device" in text
    assert "run by qnn-net-run for SM8650 on Rig <7>, Android 15" in text
    assert "79.25 ms" in text
    assert "One picture: 2.1 s = 20 x (unet) + vae_decoder" in text
    assert "invalid: thermal status 2" in text
    assert "No latency is stated" not in text
    html = report.artifact.html.read_text(encoding="utf-8")
    for graph in GRAPHS:
        assert f"{graph}: every time, in its order" in text
    assert html.count(">time (ms)</text>") == len(GRAPHS)


def test_of_the_simulator_no_time_is_told(finished: RunFolder, simulated: Path, tmp_path: Path) -> None:
    pictures = {"chelsea": {"vs_fp32": {"psnr_db": 41.5}}}
    loop = {"closed_loop": {"pictures": pictures, "image_ms": {"chelsea": 1234.5}, "steps": [{"p50_ms": 7.5}]}}
    write_json_atomic(read_json(simulated / "bench.json") | loop, tmp_path / "bench.json")
    report = make_report(finished, recipe(tmp_path))
    told = report.artifact.figures()["bench"]
    assert [graph.keys() & {"latency", "first_run_ms", "context_load_ms"} for graph in told["graphs"]] == [set(), set()]
    assert [graph["worst"].keys() for graph in told["graphs"]] == [{"vs_fp32", "vs_simulator"}] * 2
    assert told["closed_loop"] == {"pictures": pictures, "steps": [{}]}
    text = report.page.text
    assert ("The bundle in the simulator" in text, "No latency is stated" in text) == (True, True)


def test_the_bench_of_another_bundle_is_refused(finished: RunFolder, simulated: Path, tmp_path: Path) -> None:
    result = read_json(simulated / "bench.json") | {"bundle": "0" * 64}
    write_json_atomic(result, tmp_path / "bench.json")
    with pytest.raises(UsageError, match="is the result of another bundle than .*70-android/bundle"):
        make_report(finished, recipe(tmp_path))
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(UsageError, match="no result of a bench that this sdconvert reads"):
        make_report(finished, recipe(tmp_path))
