"""How warm a phone is, waiting until it is cool, and times that a throttling phone spoilt."""

import json
from pathlib import Path

import pytest
from adb_rig import Rig
from phone import BATTERY, THERMAL, Phone

from sdconvert.android.adb import Adb
from sdconvert.android.bench import bench, bench_rows, require_valid
from sdconvert.android.climate import Climate, cool_down, parse_climate, throttled
from sdconvert.android.device import ask_phone
from sdconvert.android.measure import Job
from sdconvert.android.push import local_file
from sdconvert.android.runners import PhoneRunner
from sdconvert.android.timing import Plan
from sdconvert.android.verify import verify_bundle
from sdconvert.errors import DeviceError

REMOTE = "/data/local/tmp/sdconvert"
COOL = Climate(0, {"skin": 31.0, "nsp0": 40.0})


def test_what_android_prints_is_read_by_sensor() -> None:
    assert parse_climate(THERMAL + BATTERY) == Climate(0, {"skin": 31.9, "nsp0": 41.5, "battery": 29.1})
    # A processor's sensor jumps with every command, and NaN is a sensor that sleeps.
    others = (
        "Temperature{mValue=80.0, mType=0, mName=CPU0, mStatus=0}\n"
        "Temperature{mValue=NaN, mType=3, mName=back, mStatus=0}"
    )
    assert parse_climate(others) == Climate()
    assert parse_climate("Can't find service: thermalservice") == Climate()


def test_a_phone_rests_until_its_status_and_every_sensor_are_back() -> None:
    answers = iter(
        [Climate(1, {"skin": 31.0}), Climate(0, {"skin": 31.0, "nsp0": 43.0}), Climate(0, {"skin": 33.9, "nsp0": 42.9})]
    )
    ended = cool_down(lambda: next(answers), COOL, limit_s=60, poll_s=0)
    assert (ended.warm, list(answers)) == ("", [])


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (Climate(2, {"skin": 31.0}), "thermal status 2"),
        (Climate(0, {"skin": 34.5, "nsp0": 41.0}), "skin is 3.5 °C above the start"),
        (Climate(None, {"skin": 34.0}), "skin is 3.0 °C above the start"),
    ],
)
def test_a_phone_that_stays_warm_is_taken_as_it_is(now: Climate, said: str) -> None:
    assert cool_down(lambda: now, COOL, limit_s=0.01, poll_s=0.001).warm == said


def test_a_phone_that_says_nothing_is_not_waited_for() -> None:
    assert cool_down(Climate, Climate(), limit_s=1000).seconds < 1


@pytest.mark.parametrize(
    ("times", "climates", "said"),
    [
        ((10, 13.1), [(COOL, Climate(0, {"skin": 33.0}))], "p90/p50 = 1.31 while skin rose by 2.0 °C"),
        ((10, 12.9), [(COOL, Climate(0, {"skin": 40.0}))], ""),
        ((10, 20), [(COOL, Climate(0, {"skin": 31.4}))], ""),
        ((10, 20), [], ""),
        ((10, 10), [(COOL, Climate(1, {"skin": 31.0}))], "thermal status 1"),
        ((10, 10), [(Climate(3), COOL)], "thermal status 3"),
        # Little by little, over rounds.
        ((10, 20), [(COOL, Climate(0, {"skin": 31.6})), (COOL, Climate(0, {"skin": 32.2}))], "p90/p50 = 2.00 while"),
    ],
)
def test_times_that_a_throttling_phone_spoilt(
    times: tuple[float, float], climates: list[tuple[Climate, Climate]], said: str
) -> None:
    found = throttled(*times, climates)
    assert found.startswith(said)
    assert bool(found) == bool(said)


def runner(rig: Rig, phone: Phone, bundle: Path, scratch: Path, times_us: list[int]) -> PhoneRunner:
    answers = [bundle / f"expected/{name}/out_sample.sim.SM8650.raw" for name in ("gate-chelsea", "gate-china")]
    adb = Adb(rig.binary, phone.daemon.serial)
    files = {"bin/qnn-net-run": local_file(phone.scripted_runner(scratch, answers, times_us))}
    return PhoneRunner(adb, ask_phone(adb, REMOTE), "SM8650", files, None, REMOTE, warm_up=1)


def test_a_throttling_phone_gives_no_latency_until_it_has_cooled(rig: Rig, bundle: Path, tmp_path: Path) -> None:
    phone = rig.phone()
    job = Job(bundle, verify_bundle(bundle), runner(rig, phone, bundle, tmp_path, [5000, 5000, 9000]))
    phone.prints("hot", phone.heats_up(0, 39.0))
    [result] = bench([job], [tmp_path / "out"], Plan(inferences=5, cool_down_s=1))
    with pytest.raises(DeviceError, match="throttled while it was timed") as caught:
        require_valid([result])
    assert caught.value.exit_code == 7
    assert "gate (p90/p50 = 1.80 while skin rose by 7.1 °C)" in str(caught.value)
    written = json.loads((tmp_path / "out/bench.json").read_text())["graphs"][0]
    assert written["latency"]["QNN execute"].keys() == {"n", "samples_ms", "rounds"}
    assert written["climate"][0][1]["celsius"]["skin"] == 39
    assert bench_rows(result)[0][1:3] == ("invalid", "invalid")
    assert "| gate | invalid |" in (tmp_path / "out/bench.md").read_text()
    # The same command again, on a phone that has cooled down.
    phone.path("/properties/hot").unlink()
    phone.prints("dumpsys-thermalservice", THERMAL)
    pushed = phone.pushed_bytes
    [again] = bench([job], [tmp_path / "out"], Plan(inferences=5, cool_down_s=1))
    require_valid([again])
    assert (phone.pushed_bytes, again["graphs"][0]["first_run_ms"], again["graphs"][0]["context_load_ms"]) == (
        pushed,
        5,
        25,
    )


def test_a_phone_that_is_warm_from_the_start_is_rested_and_told_of(rig: Rig, bundle: Path, tmp_path: Path) -> None:
    phone = rig.phone()
    phone.prints("dumpsys-thermalservice", phone.heats_up(1, 40.0))
    job = Job(bundle, verify_bundle(bundle), runner(rig, phone, bundle, tmp_path, [5000]))
    [result] = bench([job], [tmp_path / "out"], Plan(inferences=2, cool_down_s=0.2))
    assert 0.2 <= result["cooled_s"] < 5
    assert "the device was still warm: thermal status 1" in " ".join(result["notes"])
    assert result["graphs"][0]["invalid"] == "thermal status 1"


def test_scatter_without_warmth_is_told_and_counts(rig: Rig, bundle: Path, tmp_path: Path) -> None:
    phone = rig.phone()
    for name in ("dumpsys-thermalservice", "dumpsys-battery"):
        phone.path(f"/properties/{name}").unlink()
    job = Job(bundle, verify_bundle(bundle), runner(rig, phone, bundle, tmp_path, [5000, 5000, 9000]))
    [result] = bench([job], [tmp_path / "out"], Plan(inferences=6))
    require_valid([result])
    assert result["notes"] == [
        "the device does not say how warm it is: whether it throttled is not known",
        "times of `gate` scatter (p90/p50 = 1.80): is something else running?",
    ]
