"""The runner: a stage is a function of its inputs, so the same inputs are not computed twice.

`fingerprint = sha256(stage, its part of the recipe, hashes of what it reads, versions of what computes it)`. A stage
whose manifest bears the same fingerprint, and whose files are still there, is reused; otherwise it is redone, and the
outcome says why. This file knows no stage: the list comes from whoever runs it.
"""

import hashlib
import inspect
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from sdconvert.artifacts import Manifest, RunFolder, describe_outputs
from sdconvert.config import Recipe, did_you_mean, dump_recipe
from sdconvert.errors import EnvironmentProblem, PreconditionError, UsageError
from sdconvert.io.files import atomic_folder, explain_disk_full, sha256_file, sha256_folder, write_text_atomic
from sdconvert.memory import PeakMemory
from sdconvert.source import source_hash

_SOURCE = "source of the stage"
_SCRATCH = ".resume-"
_HASH_BELOW_BYTES = 16 << 20  # larger outputs are trusted by their size when they are reused


class Reporter(Protocol):
    """Where a stage tells how far it is."""

    def step(self, done: int, total: int, note: str = "") -> None:
        """Say that `done` of `total` parts of the stage are finished."""


class Stage(Protocol):
    """One stretch of the road: reads finished stages and external files, writes its own folder."""

    @property
    def name(self) -> str:
        """Folder and identity, such as `30-quantize`."""

    @property
    def title(self) -> str:
        """What the stage does, in a few words for the progress bar."""

    @property
    def schema_version(self) -> int:
        """Version of what the stage writes; a new one redoes it."""

    @property
    def after(self) -> tuple[str, ...]:
        """Names of the stages that it reads."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions whose versions change its result."""

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """Return its part of the recipe, as JSON values under the recipe's own keys."""

    def inputs(self, recipe: Recipe) -> dict[str, Path]:
        """Return the external files and folders that it reads, by a name that a user knows."""

    def run(self, context: "StageContext") -> dict[str, Any]:
        """Write the stage's files below `context.out` and return its metrics, as JSON values.

        Two metrics have a meaning for whoever runs the road: `note` (text) is shown in the closing table, and
        `missed_gates` (list of texts) makes the run end with a `QualityGateError` after all is written.
        """


@dataclass(frozen=True)
class StageContext:
    """What a stage is given to work with."""

    recipe: Recipe
    out: Path
    """Empty folder that becomes the stage's own once `run` returns."""
    run: RunFolder
    """Where the stages named in `after` lie: `run.stage_folder(name)`."""
    report: Reporter
    fingerprint: str = ""
    """Of everything that decides the stage's result."""

    @property
    def scratch(self) -> Path:
        """Folder that outlives a failed run of the same fingerprint, for what need not be computed twice.

        A stage makes it on demand; it is removed when the stage has finished, is asked for afresh, or changes.
        """
        return self.run.root / f"{_SCRATCH}{self.fingerprint[:16]}"


@dataclass(frozen=True)
class StageOutcome:
    """What became of a stage."""

    stage: str
    state: Literal["reused", "ran"]
    why: str
    seconds: float
    metrics: dict[str, Any]


@dataclass(frozen=True)
class StagePlan:
    """What would become of a stage.

    Attributes:
        stage: Its name.
        state: `reuse`, or `run`.
        why: Its old result will not do; of one that will, that nothing changed.
        last: What the run folder holds of it, from whatever recipe; None if nothing.
    """

    stage: str
    state: Literal["reuse", "run"]
    why: str
    last: Manifest | None


@dataclass(frozen=True)
class Need:
    """Memory that the largest process of a stage is expected to take.

    Attributes:
        bytes: By experience with models of other sizes.
        of: What takes it, as a user knows it.
        hint: What would take less.
    """

    bytes: int
    of: str
    hint: str


@runtime_checkable
class Estimating(Protocol):
    """A stage whose memory grows with the model, as was measured."""

    @property
    def name(self) -> str:
        """As of every stage."""

    def need(self, recipe: Recipe, parameters: Mapping[str, int]) -> Need:
        """Return what it will take for models of so many parameters."""


class Titled(Protocol):
    """Work that progress can be shown of."""

    @property
    def name(self) -> str:
        """Such as `30-quantize`."""

    @property
    def title(self) -> str:
        """A few words for the progress bar."""


class Progress(Reporter, Protocol):
    """Where the runner tells what it does."""

    def begin(self, stage: Titled, why: str) -> None:
        """Say that a stage starts, and why its old result would not do."""

    def end(self, outcome: StageOutcome) -> None:
        """Say that a stage is reused or finished."""


def run_stages(
    recipe: Recipe,
    run: RunFolder,
    stages: Sequence[Stage],
    *,
    from_: str | None = None,
    to: str | None = None,
    fresh: bool = False,
    progress: Progress,
) -> list[StageOutcome]:
    """Bring the stages of a run up to date, in their order.

    Args:
        recipe: Written to the run folder as `recipe.resolved.yaml`.
        run: Created if missing; kept for this process while it works.
        stages: The whole road.
        from_: First stage to bring up to date, as `30-quantize` or `quantize`; earlier ones must be so already.
        to: Last stage to bring up to date.
        fresh: Redo every stage of the range, whatever is there.
        progress: Is told of every stage.

    Raises:
        UsageError: No stage is called `from_` or `to`, or they stand in the wrong order.
        PreconditionError: A stage before `from_` is missing or out of date.
        EnvironmentProblem: The disk is full, or another process works in the run folder.
    """
    names = [stage.name for stage in stages]
    first = find_stage(from_, names) if from_ else 0
    last = find_stage(to, names) if to else len(names) - 1
    if first > last:
        raise UsageError(f"`{names[first]}` comes after `{names[last]}`", hint="exchange --from and --to")
    for stage in stages[: last + 1]:
        # A recipe that a late stage refuses is refused before the first one works.
        stage.settings(recipe)
        stage.inputs(recipe)
    with explain_disk_full(run.root), run.lock():
        write_text_atomic(dump_recipe(recipe), run.root / "recipe.resolved.yaml")
        outcomes = []
        for position, (stage, plan, old, stale) in enumerate(_judge(recipe, run, stages[: last + 1])):
            if position < first:
                if stale:
                    raise PreconditionError(
                        f"`{run.stage_folder(stage.name)}`, which `{names[first]}` builds on, "
                        f"is not up to date: {stale}",
                        hint=f"make it with `--to {stage.name.partition('-')[2]}`, or start without --from",
                    )
            elif old and not stale and not fresh:
                outcomes.append(_reuse(old, run, progress))
            else:
                _sweep_scratch(run, keep="" if fresh else plan.fingerprint)
                outcomes.append(_redo(stage, plan, stale or "asked for with --fresh", recipe, run, progress))
        return outcomes


def plan_stages(recipe: Recipe, run: RunFolder, stages: Sequence[Stage]) -> list[StagePlan]:
    """Say what `run_stages` would do; nothing is written.

    Raises:
        UsageError: A stage refuses the recipe, or what a stage reads does not exist.
    """
    return [
        StagePlan(stage.name, "run" if stale else "reuse", stale or "nothing changed", old)
        for stage, _, old, stale in _judge(recipe, run, stages)
    ]


def _judge(
    recipe: Recipe, run: RunFolder, stages: Sequence[Stage]
) -> Iterator[tuple[Stage, "_Plan", Manifest | None, str]]:
    """Each stage with its plan, its old manifest, and why that will not do, which is empty if it will."""
    fingerprints: dict[str, str] = {}
    digests: dict[Path, str] = {}
    for stage in stages:
        plan = _plan(stage, recipe, fingerprints, digests)
        fingerprints[stage.name] = plan.fingerprint
        old = run.manifest(stage.name)
        yield stage, plan, old, _why_stale(old, plan, run.stage_folder(stage.name))


def find_stage(wanted: str, names: list[str]) -> int:
    """Return the position of a stage, given as `30-quantize` or `quantize`.

    Raises:
        UsageError: No stage is called so.
    """
    for position, name in enumerate(names):
        if wanted in (name, name.partition("-")[2]):
            return position
    raise UsageError(f"no stage is called `{wanted}`", hint=did_you_mean(wanted, [n.partition("-")[2] for n in names]))


@dataclass(frozen=True)
class _Plan:
    """Everything that decides a stage's result."""

    stage: str
    inputs: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str]

    @property
    def fingerprint(self) -> str:
        parts = [self.stage, self.inputs, self.settings, self.versions]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _plan(stage: Stage, recipe: Recipe, fingerprints: dict[str, str], digests: dict[Path, str]) -> _Plan:
    inputs = {name: fingerprints[name] for name in stage.after}
    for name, path in stage.inputs(recipe).items():
        if not path.exists():
            raise UsageError(
                f"`{stage.name}` reads {name} from `{path}`, which does not exist", hint="check the recipe"
            )
        if path not in digests:
            digests[path] = sha256_folder(path) if path.is_dir() else sha256_file(path)
        inputs[name] = digests[path]
    versions = {package: _version(package) for package in stage.packages} | {
        "format of the stage": str(stage.schema_version),
        _SOURCE: source_hash(Path(inspect.getfile(type(stage)))),
    }
    # Through JSON and back, so that a tuple here equals the list that the manifest gives.
    return _Plan(stage.name, inputs, json.loads(json.dumps(stage.settings(recipe))), versions)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError as error:
        raise EnvironmentProblem(f"the package {package} is not installed", hint="run `make setup`") from error


def _why_stale(old: Manifest | None, plan: _Plan, folder: Path) -> str:
    """Say why an old result will not do; the empty string if it will."""
    if old is None:
        return "no result yet"
    changes = [f"recipe changed: {change}" for change in _changes(_flat(old.settings), _flat(plan.settings))]
    both = sorted(old.inputs.keys() | plan.inputs.keys())
    changes += [f"input changed: {name}" for name in both if old.inputs.get(name) != plan.inputs.get(name)]
    versions = [{**versions, _SOURCE: ""} for versions in (old.versions, plan.versions)]
    changes += [f"version changed: {change}" for change in _changes(*versions)]
    if old.versions.get(_SOURCE) != plan.versions[_SOURCE]:
        changes.append("program changed")  # two checksums would tell a reader nothing
    if changes:
        return "; ".join(changes)
    for name, output in old.outputs.items():
        path = folder / name
        if not path.is_file():
            return f"output missing: {name}"
        size = path.stat().st_size
        if size != output.bytes or (size < _HASH_BELOW_BYTES and sha256_file(path) != output.sha256):
            return f"output changed: {name}"
    return ""


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    both = sorted(old.keys() | new.keys())
    return [
        f"{key} {old.get(key, 'absent')} -> {new.get(key, 'absent')}" for key in both if old.get(key) != new.get(key)
    ]


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _reuse(old: Manifest, run: RunFolder, progress: Progress) -> StageOutcome:
    outcome = StageOutcome(old.stage, "reused", "nothing changed", 0.0, old.metrics)
    _log(run, old.stage, "reused")
    progress.end(outcome)
    return outcome


def _redo(stage: Stage, plan: _Plan, why: str, recipe: Recipe, run: RunFolder, progress: Progress) -> StageOutcome:
    progress.begin(stage, why)
    _log(run, stage.name, "started", why=why)
    start, memory = time.monotonic(), PeakMemory()
    try:
        with atomic_folder(run.stage_folder(stage.name)) as out:
            metrics = stage.run(StageContext(recipe, out, run, progress, plan.fingerprint))
            seconds = round(time.monotonic() - start, 3)
            Manifest(
                stage=stage.name,
                fingerprint=plan.fingerprint,
                inputs=plan.inputs,
                outputs=describe_outputs(out),
                settings=plan.settings,
                versions=plan.versions,
                metrics=metrics,
                seconds=seconds,
                peak_rss_bytes=memory.peak_bytes(),
            ).save(out)
    except BaseException as error:
        _log(run, stage.name, "failed", seconds=round(time.monotonic() - start, 3), error=type(error).__name__)
        raise
    _sweep_scratch(run)
    _log(run, stage.name, "finished", seconds=seconds)
    outcome = StageOutcome(stage.name, "ran", why, seconds, metrics)
    progress.end(outcome)
    return outcome


def _sweep_scratch(run: RunFolder, keep: str = "") -> None:
    for folder in run.root.glob(f"{_SCRATCH}*"):
        if not keep or folder.name != f"{_SCRATCH}{keep[:16]}":
            shutil.rmtree(folder)


def _log(run: RunFolder, stage: str, event: str, **details: Any) -> None:
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "stage": stage, "event": event, **details}
    with (run.root / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")
