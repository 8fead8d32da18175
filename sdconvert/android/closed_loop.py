"""Draw the bundle's test pictures with its graphs, and measure each step of fp32's runs alone.

The sampling code is the pipeline's own (pipelines/lockstep.py): runs of all pictures wait for each other, so that each
step takes one run of the ControlNet and one of the UNet, however many pictures there are. The host keeps scheduler,
tokenizer, tiles and colour fix; every network is a graph of the bundle.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from torch import Tensor

from sdconvert.android.executors import ChainExecutor, Executor
from sdconvert.android.loop_files import LoopStep, loop_of, read_pictures, read_steps
from sdconvert.android.manifest import LOOP, Manifest
from sdconvert.errors import DeviceError, UsageError
from sdconvert.pipelines.backend import GRAPHS, graph_adapters, swap_backends
from sdconvert.pipelines.lockstep import Lockstep, Request
from sdconvert.pipelines.response import predicted_noise
from sdconvert.pipelines.weightless import weightless_pipeline

_HELD_BACK = ("controlnet",)
"""Graphs whose answers are for other graphs alone."""


@dataclass(frozen=True)
class Round:
    """All calls of a graph that were answered together."""

    graph: str
    owners: tuple[str, ...]
    """Whose call each was."""
    times_ms: tuple[float, ...]


@dataclass(frozen=True)
class ForcedStep:
    """What graphs predicted where fp32 was in one step, by picture and call."""

    step: int
    calls: tuple[tuple[str, LoopStep, Tensor], ...]
    rounds: tuple[Round, ...]


def draw_pictures(bundle: Path, manifest: Manifest, executor: Executor) -> tuple[dict[str, Tensor], tuple[Round, ...]]:
    """Sample every test picture of a bundle, all steps, with every graph answered by `executor`.

    Returns:
        Pictures (3, H, W) in [0, 1] by name, and what was run for them, in order.

    Raises:
        UsageError: The bundle has no loop, or lacks a graph.
        DeviceError: A device did not do what was asked, or an answer is not finite.
    """
    record, asked = loop_of(manifest), _Asked(ChainExecutor(executor, manifest))
    if missing := [graph for graph in GRAPHS if graph not in manifest.models()]:
        raise UsageError(
            f"the bundle of `{manifest.model}` lacks {', '.join(missing)}, without which no picture can be drawn",
            hint="package all graphs",
        )
    pipe = weightless_pipeline(bundle / LOOP / "model")
    adapters = graph_adapters(pipe, record.arguments["conditioning_scale"])
    swap_backends(pipe, adapters, {graph: asked.lockstep.runner(graph) for graph in GRAPHS})
    pipe.each = asked.lockstep.each
    low = {name: pictures["low_resolution"] for name, pictures in read_pictures(bundle, record).items()}
    works = {name: partial(pipe, picture, **record.arguments) for name, picture in low.items()}
    return dict(zip(works, asked.lockstep.run(works), strict=True)), tuple(asked.rounds)


def force_steps(bundle: Path, manifest: Manifest, executor: Executor) -> list[ForcedStep]:
    """Predict the noise of every step from where fp32 was, so that no step sees the error of another.

    Raises:
        UsageError: The bundle has no loop.
        DeviceError: As `draw_pictures`.
    """
    asked, steps = _Asked(ChainExecutor(executor, manifest)), []
    runners = {graph: asked.lockstep.runner(graph) for graph in ("controlnet", "unet")}
    every = sorted(read_steps(bundle, loop_of(manifest)), key=lambda one: one[1].step)
    # A phone holds the residuals of one step at a time: 27 MB a call at the size of Stable Diffusion 1.5.
    for step, group in groupby(every, key=lambda one: one[1].step):
        calls = {f"{name}-{index}": (name, one) for index, (name, one) in enumerate(group)}
        works = {owner: partial(predicted_noise, runners, dict(one.inputs)) for owner, (_, one) in calls.items()}
        asked.rounds.clear()
        found = asked.lockstep.run(works)
        told = tuple((name, one, noise) for (name, one), noise in zip(calls.values(), found, strict=True))
        steps.append(ForcedStep(step, told, tuple(asked.rounds)))
    return steps


class _Asked:
    """Runs in lockstep over an executor, and the notes of what it was asked."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.lockstep = Lockstep(self._execute)
        self.rounds: list[Round] = []

    def _execute(self, graph: str, requests: Sequence[Request]) -> list[dict[str, Tensor]]:
        keep = graph in _HELD_BACK
        answered = self._executor.execute(graph, [request.inputs for request in requests], keep=keep)
        owners = tuple(request.owner for request in requests)
        for owner, tensors in zip(owners, answered.outputs, strict=True):
            _check_finite(graph, owner, tensors)
        self.rounds.append(Round(graph, owners, tuple(answered.times_ms)))
        return answered.outputs


def _check_finite(graph: str, owner: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_meta and not tensor.isfinite().all():
            raise DeviceError(
                f"graph `{graph}` answered NaN or infinity in `{name}` for picture `{owner}`",
                hint="compare with the simulator: `sdconvert bench --runner sim`",
            )
