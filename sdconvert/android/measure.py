"""The course of a bench: answers, a pause for the phone to cool, times in turns, and what was asked for beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdconvert.android.climate import Climate, cool_down
from sdconvert.android.image_time import calls_per_picture
from sdconvert.android.manifest import GraphRecord, Manifest
from sdconvert.android.runners import Answers, PhoneRunner, Runner, graphs_of
from sdconvert.android.timing import Plan, Timing, joined


@dataclass(frozen=True)
class Job:
    """A verified bundle, and who runs it."""

    bundle: Path
    manifest: Manifest
    runner: Runner

    @property
    def graphs(self) -> list[GraphRecord]:
        """The graphs that are run."""
        return graphs_of(self.manifest, self.runner.soc)


@dataclass
class Measured:
    """What a bench took of one bundle, by graph."""

    answers: dict[str, Answers]
    rounds: dict[str, list[Timing]]
    ops: dict[str, dict[str, Any]]
    sustained: tuple[str, Timing] | None
    climate: Climate
    """How the device was before it had anything to do."""
    cooled_s: float
    notes: list[str]

    def timing(self, graph: str) -> Timing:
        """Return all rounds of a graph as one."""
        return joined(self.rounds[graph])


def measure(jobs: Sequence[Job], plan: Plan) -> list[Measured]:
    """Measure bundles on one device, in one session.

    Answers come first, for they need no cool phone. Then graph by graph, bundles take turns in every round, each round
    in the order opposite to the one before, so that no bundle has the cooler phone.

    Raises:
        DeviceError: The device did not do what was asked.
    """
    start = jobs[0].runner.climate()
    found = [
        Measured(job.runner.answers(job.bundle, job.manifest), {}, {}, None, start, 0.0, job.runner.about()[1])
        for job in jobs
    ]
    _cool(jobs, found, start, plan)
    for graph in dict.fromkeys(graph.name for job in jobs for graph in job.graphs):
        for index, count in enumerate(_shares(plan)):
            turns = list(zip(jobs, found, strict=True))
            for job, one in reversed(turns) if index % 2 else turns:
                for record in (record for record in job.graphs if record.name == graph):
                    timing = job.runner.timing(job.bundle, job.manifest, record, count)
                    one.rounds.setdefault(graph, []).append(timing)
    for job, one in zip(jobs, found, strict=True):
        if isinstance(job.runner, PhoneRunner):
            _take_extras(job, job.runner, one, plan)
    return found


def _cool(jobs: Sequence[Job], found: Sequence[Measured], start: Climate, plan: Plan) -> None:
    if not jobs[0].runner.is_device:
        return
    if start == Climate():
        note = "the device does not say how warm it is: whether it throttled is not known"
        for one in found:
            one.notes.append(note)
        return
    ended = cool_down(jobs[0].runner.climate, start, plan.cool_down_s)
    for one in found:
        one.cooled_s = ended.seconds
        if ended.warm:
            one.notes.append(f"after {ended.seconds:.0f} s of rest the device was still warm: {ended.warm}")


def _shares(plan: Plan) -> list[int]:
    """Spread the inferences over the rounds."""
    rounds = min(plan.rounds, plan.inferences)
    return [plan.inferences // rounds + (index < plan.inferences % rounds) for index in range(rounds)]


def _take_extras(job: Job, runner: PhoneRunner, one: Measured, plan: Plan) -> None:
    if plan.op_profile:
        one.ops = {graph.name: runner.op_profile(job.manifest, graph) for graph in job.graphs}
    if plan.sustained_minutes:
        cool_down(runner.climate, one.climate, plan.cool_down_s)
        graph = max(job.graphs, key=lambda graph: _share_of_image(job.manifest, graph.name, one))
        one.sustained = graph.name, runner.sustain(job.manifest, graph, round(plan.sustained_minutes * 60))


def _share_of_image(manifest: Manifest, graph: str, one: Measured) -> float:
    times = one.timing(graph).times_ms
    return sorted(times)[len(times) // 2] * calls_per_picture(manifest, graph)
