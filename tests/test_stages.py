"""The runner on a small real road: text is copied, then counted, in files on disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdconvert.artifacts import RunFolder
from sdconvert.config import Recipe
from sdconvert.errors import EnvironmentProblem, PreconditionError, UsageError
from sdconvert.stages import StageContext, StageOutcome, plan_stages, run_stages

NAMES = ("10-copy", "20-count", "30-tell")


class Quiet:
    """Remembers what the runner says."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def begin(self, stage: Any, why: str) -> None:
        self.said.append(("begin", stage.name, why))

    def step(self, done: int, total: int, note: str = "") -> None:
        self.said.append(("step", done, total, note))

    def end(self, outcome: StageOutcome) -> None:
        self.said.append(("end", outcome.stage, outcome.state))


class _Base:
    title = "works on text"
    schema_version = 1
    packages: tuple[str, ...] = ("pydantic",)

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        return {}

    def inputs(self, recipe: Recipe) -> dict[str, Path]:
        return {}


class Copy(_Base):
    name = "10-copy"
    after: tuple[str, ...] = ()

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        return {"qnn": {"socs": recipe.qnn.socs}}

    def inputs(self, recipe: Recipe) -> dict[str, Path]:
        return {"text": Path(recipe.checkpoint.path)}

    def run(self, context: StageContext) -> dict[str, Any]:
        source = Path(context.recipe.checkpoint.path)
        text = "".join(file.read_text() for file in sorted(source.iterdir())) if source.is_dir() else source.read_text()
        (context.out / "sub").mkdir()
        (context.out / "sub/text.txt").write_text(text)
        context.report.step(1, 1, "copied")
        return {"sqnr_db": float("inf")}


class Count(_Base):
    name = "20-count"
    after = ("10-copy",)

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        return {"quantize": recipe.quantize.model_dump(mode="json")}

    def run(self, context: StageContext) -> dict[str, Any]:
        text = (context.run.stage_folder("10-copy") / "sub/text.txt").read_text()
        (context.out / "count.txt").write_text(str(len(text)))
        if text == "interrupt":
            raise KeyboardInterrupt
        if text == "fail":
            raise ValueError("cannot count")
        if text == "fill":
            (context.out / "big").write_bytes(bytes(1 << 20))
        if text == "wait":
            (context.run.root / "waiting").touch()
            time.sleep(60)
        return {"letters": len(text)}


class Tell(_Base):
    name = "30-tell"
    after = ("20-count",)

    def run(self, context: StageContext) -> dict[str, Any]:
        shutil.copy(context.run.stage_folder("20-count") / "count.txt", context.out)
        return {}


@pytest.fixture
def road(tmp_path: Path) -> "Road":
    return Road(tmp_path)


class Road:
    """A run folder, a source, and a short way to run."""

    def __init__(self, folder: Path, text: str = "hello") -> None:
        self.source = folder / "source.txt"
        self.source.write_text(text)
        self.run = RunFolder(folder / "build/test")
        self.stages = [Copy(), Count(), Tell()]
        self.progress = Quiet()

    def recipe(self, **sections: dict[str, Any]) -> Recipe:
        return Recipe.model_validate({"checkpoint": {"path": str(self.source)}, **sections})

    def go(self, recipe: Recipe | None = None, **options: Any) -> list[StageOutcome]:
        return run_stages(recipe or self.recipe(), self.run, self.stages, progress=self.progress, **options)

    def states(self, recipe: Recipe | None = None, **options: Any) -> str:
        return " ".join(outcome.state for outcome in self.go(recipe, **options))

    def leftovers(self) -> list[Path]:
        return list(self.run.root.rglob(".partial-*"))


def test_first_run_runs_all_second_reuses_all(road: Road) -> None:
    assert [(outcome.stage, outcome.state, outcome.why) for outcome in road.go()] == [
        (name, "ran", "no result yet") for name in NAMES
    ]
    assert ("step", 1, 1, "copied") in road.progress.said
    again = road.go()
    assert [(outcome.state, outcome.why, outcome.seconds) for outcome in again] == [
        ("reused", "nothing changed", 0)
    ] * 3
    assert again[0].metrics == {"sqnr_db": float("inf")}
    assert (road.run.root / "30-tell/count.txt").read_text() == "5"


def test_a_plan_says_what_a_run_then_does_and_writes_nothing(road: Road) -> None:
    first = road.recipe()
    assert [(plan.state, plan.why, plan.last) for plan in plan_stages(first, road.run, road.stages)] == [
        ("run", "no result yet", None)
    ] * 3
    assert not road.run.root.exists()
    road.go(first)
    (road.run.root / "30-tell/count.txt").unlink()
    changed = road.recipe(quantize={"weight_bitwidth": 4})
    for recipe in (changed, first, changed):
        files = {path: path.stat().st_mtime_ns for path in road.run.root.rglob("*")}
        plans = plan_stages(recipe, road.run, road.stages)
        assert {path: path.stat().st_mtime_ns for path in road.run.root.rglob("*")} == files
        assert [plan.last for plan in plans] == [road.run.manifest(name) for name in NAMES]
        said = [(plan.stage, {"reuse": "reused", "run": "ran"}[plan.state], plan.why) for plan in plans]
        assert [(outcome.stage, outcome.state, outcome.why) for outcome in road.go(recipe)] == said


def test_manifest_log_and_resolved_recipe_say_what_happened(road: Road) -> None:
    road.go()
    manifest = road.run.manifest("10-copy")
    assert manifest
    assert manifest.outputs["sub/text.txt"].bytes == 5
    assert manifest.settings == {"qnn": {"socs": ["SM8650"]}}
    assert manifest.peak_rss_bytes > 1 << 20
    assert manifest.seconds >= 0
    events = [json.loads(line) for line in (road.run.root / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["started", "finished"] * 3
    resolved = yaml.safe_load((road.run.root / "recipe.resolved.yaml").read_text())
    assert resolved == road.recipe().model_dump(mode="json")
    assert road.leftovers() == []


def test_a_changed_setting_redoes_its_stage_and_those_that_read_it(road: Road) -> None:
    road.go()
    outcomes = road.go(road.recipe(quantize={"weight_bitwidth": 4}))
    assert [outcome.state for outcome in outcomes] == ["reused", "ran", "ran"]
    assert outcomes[1].why == "recipe changed: quantize.weight_bitwidth 8 -> 4"
    assert outcomes[2].why == "input changed: 20-count"
    assert road.states(road.recipe(quantize={"weight_bitwidth": 4}, pipeline={"seed": 7})) == "reused reused reused"


def test_a_changed_input_is_named(road: Road) -> None:
    road.go()
    road.source.write_text("hallo")
    assert road.go()[0].why == "input changed: text"
    road.source.unlink()
    road.source.mkdir()
    (road.source / "a").write_text("one")
    assert road.go()[0].why == "input changed: text"
    (road.source / "a").rename(road.source / "b")
    assert road.go()[0].why == "input changed: text"
    shutil.rmtree(road.source)
    with pytest.raises(UsageError, match=r"`10-copy` reads text from .*does not exist"):
        road.go()


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda folder: (folder / "sub/text.txt").unlink(), "output missing: sub/text.txt"),
        (lambda folder: (folder / "sub/text.txt").write_text("hallo"), "output changed: sub/text.txt"),
        (lambda folder: (folder / "sub/text.txt").write_text(""), "output changed: sub/text.txt"),
        (lambda folder: (folder / "manifest.json").unlink(), "no result yet"),
        (lambda folder: (folder / "manifest.json").write_text('{"stage": '), "no result yet"),
    ],
)
def test_damaged_results_are_not_reused(road: Road, damage: Any, why: str) -> None:
    road.go()
    damage(road.run.stage_folder("10-copy"))
    outcomes = road.go()
    assert outcomes[0].why == why
    assert [outcome.state for outcome in outcomes] == ["ran", "reused", "reused"]


def test_versions_and_formats_count(road: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    road.go()
    monkeypatch.setattr(Tell, "schema_version", 2)
    assert road.go()[2].why == "version changed: format of the stage 1 -> 2"
    monkeypatch.setattr("sdconvert.stages.version", lambda package: "0")
    assert road.go()[0].why.startswith("version changed: pydantic")
    monkeypatch.setattr("sdconvert.stages.source_hash", lambda path: "0")
    assert road.go()[0].why == "program changed"
    monkeypatch.undo()
    monkeypatch.setattr(Copy, "packages", ("no-such-package",))
    with pytest.raises(EnvironmentProblem, match="no-such-package is not installed"):
        road.go()


def test_x9_a_stage_before_its_inputs_names_the_missing_artifact_and_the_command(road: Road) -> None:
    with pytest.raises(PreconditionError, match=r"10-copy`, which `20-count` builds on, .*: no result yet") as error:
        road.go(from_="count")
    assert "make it with `--to copy`" in error.value.hint
    road.go()
    (road.run.stage_folder("20-count") / "count.txt").unlink()
    with pytest.raises(PreconditionError, match=r"20-count`, which `30-tell` .*: output missing: count\.txt") as error:
        road.go(from_="tell")
    assert "make it with `--to count`" in error.value.hint


def test_range_and_fresh(road: Road) -> None:
    with pytest.raises(PreconditionError):
        road.go(from_="count")
    assert road.states(to="20-count") == "ran ran"
    assert road.states(from_="count") == "reused ran"
    assert road.states(from_="tell", fresh=True) == "ran"
    assert road.states(to="copy", fresh=True) == "ran"
    assert road.states() == "reused reused reused"
    with pytest.raises(UsageError, match="no stage is called `tel`") as caught:
        road.go(to="tel")
    assert "`tell`" in caught.value.hint
    with pytest.raises(UsageError, match="comes after"):
        road.go(from_="tell", to="copy")


@pytest.mark.parametrize(("text", "error"), [("interrupt", KeyboardInterrupt), ("fail", ValueError)])
def test_a_failed_stage_leaves_nothing_and_the_next_run_goes_on(
    road: Road, text: str, error: type[BaseException]
) -> None:
    road.source.write_text(text)
    with pytest.raises(error):
        road.go()
    assert road.leftovers() == []
    assert sorted(path.name for path in road.run.root.iterdir() if path.is_dir()) == ["10-copy"]
    last = (road.run.root / "log.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["event"] == "failed"
    road.source.write_text("hello")
    assert road.states() == "ran ran ran"


def test_a_failed_stage_keeps_its_older_result(road: Road) -> None:
    road.go()
    road.source.write_text("fail")
    with pytest.raises(ValueError, match="cannot count"):
        road.go()
    assert (road.run.root / "20-count/count.txt").read_text() == "5"
    road.source.write_text("hello")
    assert road.states() == "ran reused reused"


def test_full_disk_ends_with_a_hint_and_without_leftovers(road: Road, small_disk: Path) -> None:
    road.run = RunFolder(small_disk / "build/test")
    road.source.write_text("fill")
    with pytest.raises(EnvironmentProblem, match="no space left") as caught:
        road.go()
    assert "--build" in caught.value.hint
    assert road.leftovers() == []
    road.source.write_text("small")
    assert road.states() == "ran ran ran"


def test_two_runs_at_once_and_a_killed_one(road: Road) -> None:
    road.source.write_text("wait")
    code = f"import test_stages, pathlib; test_stages.Road(pathlib.Path({str(road.source.parent)!r}), 'wait').go()"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    other = subprocess.Popen([sys.executable, "-c", code], env=environment)
    while not (road.run.root / "waiting").exists():
        assert other.poll() is None
        time.sleep(0.05)
    with pytest.raises(EnvironmentProblem, match="another run is at work"):
        road.go()
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert len(road.leftovers()) == 1
    road.source.write_text("hello")
    assert road.states() == "ran ran ran"
    assert road.leftovers() == []
