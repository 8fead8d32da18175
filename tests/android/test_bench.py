"""A bench from the bundle to its scores, with the simulator in this process and behind adb."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adb_rig import Rig

from sdconvert.android.adb import Adb
from sdconvert.android.bench import bench, bench_columns, bench_rows
from sdconvert.android.climate import Climate
from sdconvert.android.device import ask_phone
from sdconvert.android.image_time import calls_per_picture, image_time
from sdconvert.android.manifest import ChainRecord, Manifest
from sdconvert.android.measure import Job
from sdconvert.android.push import local_file
from sdconvert.android.runners import PhoneRunner, SimulatorRunner
from sdconvert.android.scores import accuracy_figures, latency_figures, timing_figures
from sdconvert.android.timing import Plan, Timing, joined
from sdconvert.android.verify import verify_bundle
from sdconvert.cli.app import main
from sdconvert.errors import DeviceError
from sdconvert.qnn.simulator import Simulator

REMOTE = "/data/local/tmp/sdconvert"


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return verify_bundle(bundle)


def test_the_simulator_scores_as_recorded_and_claims_no_latency(
    bundle: Path, manifest: Manifest, tmp_path: Path
) -> None:
    job = Job(bundle, manifest, SimulatorRunner("SM8550", Simulator))
    [result] = bench([job], [tmp_path / "out"], Plan(inferences=3))
    assert (result["is_device"], result["device"], result["soc"]) == (False, None, "SM8550")
    assert "no figure of a device" in result["notes"][0]
    [graph] = result["graphs"]
    figures = graph["outputs"]["out_sample"]
    same = {"sqnr_db": math.inf, "psnr_db": math.inf, "cosine": pytest.approx(1), "max_abs": 0, "bit_equal": True}
    assert figures["vs_simulator"] == same
    assert 40 < figures["vs_fp32"]["sqnr_db"] < figures["vs_fp32"]["psnr_db"] < 80
    assert graph["latency"]["simulator"]["n"] == 3
    page = (tmp_path / "out/bench.md").read_text()
    assert "p50 ms (no device)" in page
    assert json.loads((tmp_path / "out/bench.json").read_text())["model"] == "gate-test"


def test_a_phone_scores_as_the_simulator_it_runs(rig: Rig, bundle: Path, manifest: Manifest, tmp_path: Path) -> None:
    phone = rig.phone()
    adb = Adb(rig.binary, phone.daemon.serial)
    files = {
        "bin/qnn-net-run": local_file(phone.stand_in_runner(tmp_path)),
        "models/SM8650/gate.ctx.onnx": local_file(bundle / "models/SM8650/gate.ctx.onnx"),
    }
    runner = PhoneRunner(adb, ask_phone(adb, REMOTE), "SM8650", files, None, REMOTE, warm_up=2)
    [result] = bench(
        [Job(bundle, manifest, runner)], [tmp_path / "out"], Plan(inferences=5, op_profile=True, sustained_minutes=0.01)
    )
    [graph] = result["graphs"]
    assert graph["outputs"]["out_sample"]["vs_simulator"]["bit_equal"]
    assert (graph["latency"]["QNN execute"]["n"], len(graph["latency"]["QNN execute"]["samples_ms"])) == (5, 5)
    assert graph["peak_kb"] > 10_000
    assert graph["context_load_ms"] > 0
    assert graph["first_run_ms"] not in graph["latency"]["QNN execute"]["samples_ms"]
    # The backend's own figures of the graph: its ops, and what enters and leaves it.
    assert {op["op"].partition(":")[0] for op in graph["op_profile"]["top"]} >= {"Sigmoid4", "Input OpId_2"}
    assert sum(op["share"] for op in graph["op_profile"]["top"]) == pytest.approx(1)
    assert "Number of HVX threads used" in graph["counters"]
    sustained = result["sustained"]
    assert (sustained["graph"], sustained["n"] == len(sustained["samples_ms"])) == ("gate", True)
    assert sustained["busy_s"] < 1
    page = (tmp_path / "out/bench.md").read_text()
    assert all(part in page for part in ("## Ops of `gate`", "## Without a pause", "nsp0 41.5 °C"))
    assert (result["device"]["model"], result["device"]["soc"], result["is_device"]) == ("Rig", "SM8650", True)
    assert bench_columns(result)[1] == "p50 ms"
    assert bench_rows(result)[0][0] == "gate"


def test_statistics_are_those_of_the_samples() -> None:
    told = latency_figures([4.0, 1.0, 2.0, 3.0])
    assert {key: told[key] for key in ("n", "mean_ms", "min_ms", "max_ms", "p50_ms")} == {
        "n": 4,
        "mean_ms": 2.5,
        "min_ms": 1,
        "max_ms": 4,
        "p50_ms": 2.5,
    }
    assert told["std_ms"] == pytest.approx(math.sqrt(1.25))
    assert told["cv"] == pytest.approx(math.sqrt(1.25) / 2.5)
    assert told["samples_ms"] == [4.0, 1.0, 2.0, 3.0]


def test_the_npus_own_time_stands_beside_the_latency() -> None:
    timing = joined([Timing([3.0, 5.0], npu_ms=[1.0, 2.0]), Timing([4.0], npu_ms=[3.0])])
    latency = timing_figures(timing, [2, 1], "QNN execute")["latency"]["QNN execute"]
    assert (latency["p50_ms"], latency["npu"]["p50_ms"], latency["npu"]["samples_ms"]) == (4, 2, [1, 2, 3])
    # Of some of the inferences alone it would be another median.
    assert "npu" not in timing_figures(joined([timing, Timing([3.0])]), [3, 1], "x")["latency"]["x"]
    hot = replace(timing, climates=((Climate(1), Climate(1)),))
    assert "npu" not in timing_figures(hot, [2, 1], "x")["latency"]["x"]


def test_a_picture_costs_every_step_and_one_decoding(manifest: Manifest) -> None:
    graph = manifest.graphs[0]
    graphs = tuple(graph.model_copy(update={"name": name}) for name in ("controlnet", "unet", "vae_decoder"))
    road = manifest.model_copy(update={"graphs": graphs, "scheduler": {"timesteps": list(range(20))}})
    times = {"controlnet": 30.0, "unet": 70.0, "vae_decoder": 200.0}
    told = image_time(road, times)
    assert told == {"seconds": pytest.approx(2.2), "steps": 20, "formula": "20 x (controlnet + unet) + vae_decoder"}
    # A graph whose time is not valid, or steps that nobody tells, give no sum.
    del times["unet"]
    assert image_time(road, times) is None
    assert image_time(manifest, {"gate": 1.0}) is None
    assert image_time(road.model_copy(update={"scheduler": {}}), times | {"unet": 70.0}) is None


def test_a_picture_costs_every_part_of_a_split_graph(manifest: Manifest) -> None:
    graph = manifest.graphs[0]
    names = ("controlnet", "unet_1", "unet_2", "vae_decoder")
    chain = ChainRecord(name="unet", parts=("unet_1", "unet_2"), outputs=("out_sample",))
    graphs = tuple(graph.model_copy(update={"name": name}) for name in names)
    road = manifest.model_copy(
        update={"graphs": graphs, "chains": (chain,), "scheduler": {"timesteps": list(range(20))}}
    )
    times = {"controlnet": 30.0, "unet_1": 30.0, "unet_2": 40.0, "vae_decoder": 200.0}
    told = image_time(road, times)
    assert told == {"seconds": pytest.approx(2.2), "steps": 20, "formula": "20 x (controlnet + unet) + vae_decoder"}
    assert [calls_per_picture(road, name) for name in names] == [20, 20, 20, 1]
    del times["unet_1"]
    assert image_time(road, times) is None


def test_answers_that_make_no_sense_are_refused(bundle: Path, manifest: Manifest) -> None:
    graph = manifest.graphs[0]
    same = {"out_sample": torch.ones(1, 3, 8, 8)}
    with pytest.raises(DeviceError, match="gave the same `out_sample` for samples `gate-chelsea` and `gate-china`"):
        accuracy_figures(bundle, manifest, graph, {"gate-chelsea": same, "gate-china": same})
    with pytest.raises(DeviceError, match="answered NaN or infinity in `out_sample` for sample `gate-china`"):
        accuracy_figures(bundle, manifest, graph, {"gate-china": {"out_sample": torch.full((1, 3, 8, 8), math.nan)}})


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, object], str]:
    with pytest.raises(SystemExit) as left:
        main(["--json", "bench", *arguments])
    said = capsys.readouterr()
    return int(str(left.value.code)), json.loads(said.out), said.err


def test_the_command_runs_the_simulator(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = (str(bundle), "--runner", "sim", "--inferences", "2", "-o", str(tmp_path / "out"))
    code, told, _ = command(capsys, *asked)
    assert (code, told["runner"], told["soc"]) == (0, "sim", "SM8650")
    assert (tmp_path / "out/bench.md").is_file()
    code, _, err = command(capsys, *asked, "--soc", "SM8750")
    assert (code, "the bundle is for SM8650, SM8550, not for SM8750" in err) == (2, True)
    code, _, err = command(capsys, *asked, "--serial", "x", "--qairt-sdk", "y")
    assert (code, "--qairt-sdk, --serial has no effect with --runner sim" in err) == (2, True)
    code, told, _ = command(capsys, str(bundle.with_suffix(".tar")), *asked[1:])
    assert (code, told["soc"]) == (0, "SM8650")
    code, _, err = command(capsys, *asked, "--runner", "ort", "--op-profile")
    assert (code, "--op-profile has no effect with --runner ort" in err) == (2, True)


def test_the_command_tells_what_is_missing_for_a_phone(
    rig: Rig, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = command(capsys, str(bundle))
    assert (code, "comes from the QAIRT SDK" in err) == (2, True)
    asked = (str(bundle), "--adb", str(rig.binary), "--qairt-sdk", str(tmp_path))
    code, told, err = command(capsys, *asked)
    assert (code, "no Android device is connected" in err, "error" in told) == (7, True, True)
    rig.phone(soc="SM8750")
    code, _, err = command(capsys, *asked)
    assert (code, "has SM8750" in err) == (2, True)
    rig.phone()
    code, _, err = command(capsys, *asked)
    assert (code, "2 devices are connected" in err) == (2, True)
