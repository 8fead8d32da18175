"""Two results side by side: ratios with intervals that hold what they promise, and refusals."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adb_rig import Rig
from bundle_request import BundleRequest
from test_climate import runner

from sdconvert.android.artifact import read_bench
from sdconvert.android.bench import bench
from sdconvert.android.compare import (
    blocks,
    check_bundles,
    compare,
    compare_page,
    compare_rows,
    ratio_of_medians,
)
from sdconvert.android.measure import Job
from sdconvert.android.timing import Plan
from sdconvert.android.verify import verify_bundle
from sdconvert.cli.app import main
from sdconvert.errors import UsageError
from sdconvert.io.files import write_json_atomic


def made(times: list[float], rounds: list[int] | None = None, sqnr_db: float = 40.0, **about: Any) -> dict[str, Any]:
    graph = {
        "name": "gate",
        "inputs": {"latent": [1, 3, 8, 8]},
        "invalid": "",
        "latency": {
            "QNN execute": {"samples_ms": times, "rounds": rounds or [len(times)], "p50_ms": float(np.median(times))}
        },
        "outputs": {"out_sample": {"vs_fp32": {"sqnr_db": sqnr_db}, "vs_simulator": {"sqnr_db": math.inf}}},
    }
    result = {
        "schema_version": 2,
        "session": "one",
        "bundle": "its manifest's checksum",
        "model": "a",
        "soc": "SM8650",
        "runner": "qnn-net-run",
        "is_device": True,
        "device": {"model": "Rig"},
        "test_inputs": "same",
        "graphs": [graph],
    }
    return result | about


def test_the_ratio_is_that_of_medians_and_db_are_told_by_output() -> None:
    first, second = made([10.0] * 9), made([8.0] * 9, sqnr_db=42.5, model="b")
    told = compare(first, second)
    [graph] = told["graphs"]
    assert graph["latency"] == {"first_p50_ms": 10, "second_p50_ms": 8, "ratio": 0.8, "low": 0.8, "high": 0.8}
    assert graph["outputs"]["out_sample"] == {
        "vs_fp32": {"first_db": 40.0, "second_db": 42.5, "more_db": 2.5},
        "vs_simulator": {"first_db": math.inf, "second_db": math.inf, "more_db": 0.0},
    }
    assert compare_rows(told) == [("gate", "10.000", "8.000", "0.800", "0.800 to 0.800", "+2.5", "+0.0")]
    assert "# A: a, B: b, on SM8650" in compare_page(told)


def test_times_are_cut_into_rounds_or_stretches() -> None:
    assert [list(part) for part in blocks({"samples_ms": [1, 2, 3, 4, 5], "rounds": [2, 3]})] == [[1, 2], [3, 4, 5]]
    assert [len(part) for part in blocks({"samples_ms": list(range(100)), "rounds": [100]})] == [10] * 10


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_the_interval_holds_the_truth_as_often_as_it_says(drift: float) -> None:
    # Rounds of a phone that is faster or slower as a whole, for both bundles alike; the truth is 0.9.
    generator, held, widths = np.random.default_rng(0), 0, []
    for _ in range(20):
        mood = np.exp(drift * generator.standard_normal(10))
        first = [m * (10 + 0.1 * generator.standard_normal(10)) for m in mood]
        second = [m * (9 + 0.1 * generator.standard_normal(10)) for m in mood]
        _, low, high = ratio_of_medians(first, second, paired=True)
        held += low <= 0.9 <= high
        widths.append(high - low)
    assert held >= 16
    # Drawing rounds one by one, as of two sessions, cannot tell the phone's mood from the bundle.
    _, low, high = ratio_of_medians(first, second, paired=False)
    assert (high - low > 3 * float(np.median(widths))) == bool(drift)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_device": False}, "one result is of a device and one of the simulator"),
        ({"soc": "SM8550"}, "one result is of SM8650, the other of SM8550"),
        ({"runner": "ort"}, "one result is of qnn-net-run, the other of ort"),
        ({"graphs": []}, "`a` and `b` are not builds of one model: graph `gate` is in one of them only"),
    ],
)
def test_results_that_cannot_be_compared_say_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        compare(made([1.0]), made([1.0], model="b") | changes)
    assert (caught.value.exit_code, bool(caught.value.hint)) == (2, True)


def test_a_graph_of_another_size_is_another_model() -> None:
    other = copy.deepcopy(made([1.0]))
    other["graphs"][0]["inputs"]["latent"] = [1, 3, 16, 16]
    with pytest.raises(UsageError, match="not builds of one model"):
        compare(made([1.0]), other)


def test_what_cannot_be_told_is_left_out_and_noted() -> None:
    first, second = made([1.0] * 4), made([1.0] * 4, session="two", test_inputs="others", device={"model": "Other"})
    second["graphs"][0]["invalid"] = "thermal status 2"
    told = compare(first, second)
    assert [note.partition(":")[0] for note in told["notes"]] == [
        "taken in two sessions",
        "taken on two phones, Rig and Other",
        "the bundles have other test inputs",
    ]
    assert compare_rows(told) == [("gate", "invalid", "invalid", "invalid", "invalid", "", "")]
    simulated = compare(made([1.0], is_device=False), made([1.0], is_device=False))
    assert (simulated["graphs"][0]["latency"], "only the answers" in simulated["notes"][0]) == (None, True)


def test_files_that_are_no_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no result of a bench at"):
        read_bench(tmp_path)
    for content in ("{}", "[1]", '{"schema_version": 1}', "{"):
        (tmp_path / "bench.json").write_text(content)
        with pytest.raises(
            UsageError, match="is no result of a bench that this sdconvert reads|cannot be read as JSON"
        ):
            read_bench(tmp_path)
    write_json_atomic(made([1.0]), tmp_path / "bench.json")
    assert read_bench(tmp_path) == read_bench(tmp_path / "bench.json") == made([1.0])


def test_two_bundles_take_turns_on_one_phone(
    rig: Rig, bundle: Path, asked: BundleRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phone = rig.phone()
    other = asked.write(tmp_path / "other", model="gate-other")
    jobs = []
    for index, folder in enumerate((bundle, other)):
        made_runner = runner(rig, phone, folder, tmp_path, [5000, 6000])
        made_runner.remote += "/second" if index else ""
        jobs.append(Job(folder, verify_bundle(folder), made_runner))
    check_bundles(jobs)
    phone.commands.clear()
    results = bench(jobs, [tmp_path / "a", tmp_path / "b"], Plan(inferences=5, rounds=2))
    timed = [command for command in phone.commands if "latency=" in command]
    # In each round the order of the one before, turned round; each round has its warm-up.
    assert [("second" in command, "latency=4" in command) for command in timed] == [
        (False, True),
        (True, True),
        (True, False),
        (False, False),
    ]
    assert results[0]["session"] == results[1]["session"]
    assert results[0]["graphs"][0]["latency"]["QNN execute"]["rounds"] == [3, 2]
    assert len(results[0]["graphs"][0]["climate"]) == 2
    with pytest.raises(SystemExit, match="^0$"):
        main(["--json", "compare", str(tmp_path / "a"), str(tmp_path / "b/bench.json")])
    told = json.loads(capsys.readouterr().out)
    assert (told["one_session"], told["notes"], told["models"]) == (True, [], ["gate-test", "gate-other"])
    assert told["graphs"][0]["latency"]["ratio"] == 1


def test_bundles_of_two_models_are_refused_before_they_are_run(
    bundle: Path, asked: BundleRequest, tmp_path: Path
) -> None:
    class Nobody:
        soc = "SM8650"

    manifest = verify_bundle(bundle)
    renamed = manifest.model_copy(
        update={"graphs": tuple(graph.model_copy(update={"name": "other"}) for graph in manifest.graphs)}
    )
    jobs: Any = [Job(bundle, manifest, Nobody()), Job(bundle, renamed, Nobody())]  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not builds of one model: graph `gate`"):
        check_bundles(jobs)


def test_the_command_runs_two_bundles_in_the_simulator(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["bench", str(bundle), str(bundle), "--runner", "sim", "--inferences", "2", "-o", str(tmp_path)]
    with pytest.raises(SystemExit, match="^0$"):
        main(["--json", *asked])
    told = json.loads(capsys.readouterr().out)
    assert "only the answers are compared" in told["comparison"]["notes"][0]
    assert told["comparison"]["graphs"][0]["outputs"]["out_sample"]["vs_fp32"]["more_db"] == 0
    assert (tmp_path / "compare.md").is_file()
    assert (tmp_path / "a/bench.json").is_file()
    with pytest.raises(SystemExit, match="^2$"):
        main(["bench", *[str(bundle)] * 3, "--runner", "sim"])
