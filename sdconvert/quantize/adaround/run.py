"""AdaRound of a traced graph: plan, advance, solve, commit; group after group, each resumable."""

import hashlib
import itertools
import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule

from sdconvert.errors import PreconditionError, UsageError
from sdconvert.io.encodings import Encoding
from sdconvert.memory import freed_at_once
from sdconvert.metrics import sqnr_db
from sdconvert.quantize.adaround.advance import FLOATING, QUANTIZED, Frontiers
from sdconvert.quantize.adaround.block_rounds import BlockRounds
from sdconvert.quantize.adaround.blocks import Block, BlockFigures, find_blocks
from sdconvert.quantize.adaround.centered import MeanSource
from sdconvert.quantize.adaround.code_grid import CodeGrid
from sdconvert.quantize.adaround.commit import Commits, CommittedGroup, parameter_encodings
from sdconvert.quantize.adaround.layers import RoundedLayer
from sdconvert.quantize.adaround.moments import Channels, GramMoments, LayerGroup, Moments, Source
from sdconvert.quantize.adaround.offsets import OffsetMoments, by_offsets, gram_by_offsets
from sdconvert.quantize.adaround.plan import GroupPlan, MomentsPlan, Plan, make_plan
from sdconvert.quantize.adaround.reconstruct import Reconstruction
from sdconvert.quantize.adaround.solve import LayerFigures, LayerResult, Measured, SolverSettings, join, solve
from sdconvert.quantize.adaround.steps import RoundedGroup, SegmentedGraph
from sdconvert.quantize.adaround.store import ActivationStore
from sdconvert.quantize.adaround.tiles import PanelMoments, RowMoments

Label = Callable[[int], str]
_VERSION = 3  # of what decides codes; part of every fingerprint
_LEAST_SAMPLES = 4  # with fewer, none is held out


@dataclass(frozen=True)
class AdaRoundSettings:
    """What AdaRound does.

    Attributes:
        solver: How a layer is rounded.
        inputs: `sequential`: a layer's input comes through the layers rounded before it, its target is the
            floating-point path's output. `fp`: both are the floating-point path's.
        correct_bias: A layer's bias makes up for the mean of its output's error.
        quantizers: The graph's own quantizers are active on the quantized path. AIMET's AdaRound has them off.
        held_out: Share of the samples that only judge.
        budget_bytes: Memory beside runtime and weights.
        half_precision: Waiting tensors are float16, not float32.
        reconstruct: What is rounded again in blocks; None: nothing.
    """

    solver: SolverSettings = field(default_factory=SolverSettings)
    inputs: Literal["sequential", "fp"] = "sequential"
    correct_bias: bool = True
    quantizers: bool = False
    held_out: float = 0.1
    budget_bytes: int = 1 << 30
    half_precision: bool = True
    reconstruct: Reconstruction | None = None

    def held_out_samples(self, count: int) -> list[int]:
        """Which of `count` samples only judge: evenly spread, for their order is that of pictures and timesteps."""
        share = min(count - 1, max(1, round(self.held_out * count))) if self.held_out and count >= _LEAST_SAMPLES else 0
        return [int((index + 0.5) * count / share) for index in range(share)]


class Samples(Protocol):
    """A calibration set: as many graph inputs by name as its length says."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, Tensor]]: ...


class Report(Protocol):
    """Is told how far it is."""

    def __call__(self, done: int, total: int, note: str) -> None:
        """As a stage's `report.step`."""


@dataclass(frozen=True)
class AdaRoundResult:
    """Rounded weights, which lie in the folder that was given, and figures.

    Attributes:
        groups: In execution order.
        plan: What was planned.
        forwards: Runs of the whole graph, both paths together.
        resumed: Groups that an earlier run had finished.
        cpu_seconds: Of the process, by what it did: `forward`, `moments`, `solve`.
        output_sqnr_db: Of the graph's outputs over the held-out samples (all, if none is), quantized against
            floating-point path; NaN with `fp` inputs.
    """

    groups: tuple[CommittedGroup, ...]
    plan: Plan
    forwards: float
    resumed: int
    cpu_seconds: Mapping[str, float]
    output_sqnr_db: float

    @property
    def blocks(self) -> tuple[BlockFigures, ...]:
        """Of the blocks that were reconstructed, in execution order."""
        return tuple(group.block for group in self.groups if group.block)

    @property
    def figures(self) -> dict[str, LayerFigures]:
        """By weight, in execution order."""
        return {name: figures for group in self.groups for name, figures in group.figures.items()}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every rounded weight with its name, one in memory at a time."""
        for group in self.groups:
            for name in group.layers:
                yield name, group.weight(name)

    def biases(self) -> dict[str, Tensor]:
        """Every bias that changed with a weight, by its own name."""
        return {str(group.layers[name].bias): bias for group in self.groups for name, bias in group.biases.items()}

    def encodings(self) -> dict[str, list[Encoding]]:
        """As AIMET's `set_and_freeze_param_encodings` takes them."""
        return parameter_encodings(self.groups)


@torch.no_grad()
def adaround(
    graph_module: GraphModule,
    samples: Samples,
    grids: Mapping[str, CodeGrid],
    settings: AdaRoundSettings,
    folder: Path,
    *,
    fixed_weights: Mapping[str, Tensor] | None = None,
    label: Label = "calibration sample {}".format,
    report: Report = lambda done, total, note: None,
) -> AdaRoundResult:
    """Round weights of a graph so that each layer's output changes least.

    A layer with an activation behind it is judged by its own output like every other: for a smooth activation that
    differs from AIMET's objective, which compares behind the activation.

    Args:
        graph_module: From `graph.trace`, or a simulation's with its quantizers. Its weights stay.
        samples: Calibration data of the graph.
        grids: Of the weights to be rounded, by name.
        settings: What to do.
        folder: For finished groups, and for scratch while it runs. A run that was killed goes on from it, to the same
            codes.
        fixed_weights: Other weights that are rounded already, for the quantized path.
        label: What a message calls a sample.
        report: Is told of every group.

    Raises:
        PreconditionError: There is nothing to round, or no sample.
        UsageError: A weight is none of the graph, or a sample none of its inputs or not finite.
        BudgetError: A layer or a sample does not fit the budget.
        EnvironmentProblem: The disk is full; finished groups stay.
    """
    if not grids:
        raise PreconditionError("AdaRound has no weights to round", hint="give grids of convolutions or linear layers")
    run = _Run(SegmentedGraph(graph_module, grids), grids, settings, folder, dict(fixed_weights or {}), len(samples))
    with freed_at_once():
        return run(samples, label, report)


def plan_adaround(graph_module: GraphModule, grids: Collection[str], settings: AdaRoundSettings, samples: int) -> Plan:
    """What `adaround` will take with these arguments, and as many samples.

    Raises:
        PreconditionError: There is no sample.
        UsageError: A weight is none of the graph.
        BudgetError: A layer or a sample does not fit the budget.
    """
    segmented = SegmentedGraph(graph_module, grids)
    return _plan(segmented, settings, samples, _blocks(segmented, settings))


def _blocks(segmented: SegmentedGraph, settings: AdaRoundSettings) -> tuple[Block, ...]:
    wanted = settings.reconstruct
    return find_blocks(segmented, wanted.kind, paths=wanted.paths, largest=wanted.largest) if wanted else ()


def _plan(segmented: SegmentedGraph, settings: AdaRoundSettings, samples: int, blocks: Sequence[Block]) -> Plan:
    return make_plan(
        segmented,
        samples=samples,
        held_out=len(settings.held_out_samples(samples)),
        budget_bytes=settings.budget_bytes,
        item_bytes=2 if settings.half_precision else 4,
        row_arrays=settings.solver.row_arrays,
        blocks=tuple(blocks),
        quantizers=settings.quantizers,
    )


class _Run:
    def __init__(
        self,
        segmented: SegmentedGraph,
        grids: Mapping[str, CodeGrid],
        settings: AdaRoundSettings,
        folder: Path,
        fixed: dict[str, Tensor],
        count: int,
    ) -> None:
        self._segmented, self._grids, self._settings, self._folder = segmented, grids, settings, folder
        self._held_out = settings.held_out_samples(count)
        self._fitted = sorted(set(range(count)) - set(self._held_out))
        self._fixed, self._done = fixed, list[CommittedGroup]()
        self._parameters = segmented.parameters()
        layers = [layer for group in segmented.groups for layer in group.layers]
        # Name of a bias → name of the weight that it goes with.
        self._biases = {layer.bias: layer.name for layer in layers if layer.bias is not None and settings.correct_bias}
        self._current: dict[str, Tensor] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._blocks = _blocks(segmented, settings)
        self.plan = _plan(segmented, settings, count, self._blocks)

    def __call__(self, samples: Samples, label: Label, report: Report) -> AdaRoundResult:
        segmented, settings = self._segmented, self._settings
        commits = Commits(self._folder / "groups")
        dtype = torch.float16 if settings.half_precision else torch.float32
        resumed = 0
        with ActivationStore(self.plan.store_bytes, self._folder / "activations", dtype) as store:
            frontiers = Frontiers(
                segmented,
                store,
                sequential=settings.inputs == "sequential",
                quantizers=settings.quantizers,
                weights={*self._grids, *self._biases, *self._fixed},
            )
            digest = _Digest(settings, self._parameters, self._grids, self._fixed)
            with self._timed("forward"):
                frontiers.ingest(digest.following(samples), label)
            fingerprints = [digest.of(index, group.layers) for index, group in enumerate(segmented.groups)]
            rounds = self._rounds(frontiers, store, commits, digest)
            self._done += rounds.finished
            wanted = [not {layer.name for layer in group.layers} <= rounds.covered for group in segmented.groups]
            commits.sweep([*itertools.compress(fingerprints, wanted), *rounds.fingerprints])
            for index, group in enumerate(segmented.groups):
                report(index, len(segmented.groups), group.layers[0].name)
                self._current.clear()
                with self._timed("forward"):
                    frontiers.advance(index, self._weight)
                self._current.clear()
                rounds.before(index)
                committed = commits.find(fingerprints[index], group.layers, self._grids) if wanted[index] else None
                resumed += committed is not None or not wanted[index]
                if committed is None and wanted[index]:
                    results = self._solve(group, self.plan.groups[index], frontiers)
                    committed = commits.commit(fingerprints[index], group.layers, results)
                if committed is not None:
                    self._done.append(committed.without(rounds.covered))
                self._current.clear()
                rounds.behind(index, self._done)
            self._current.clear()
            with self._timed("forward"):
                output = self._output_sqnr_db(frontiers)
        order = [layer.name for group in segmented.groups for layer in group.layers]
        self._done.sort(key=lambda group: min(order.index(name) for name in group.layers))
        return AdaRoundResult(tuple(self._done), self.plan, frontiers.forwards, resumed, self._seconds, output)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self._seconds[what] += time.process_time() - start

    def _rounds(self, frontiers: Frontiers, store: ActivationStore, commits: Commits, digest: "_Digest") -> BlockRounds:
        return BlockRounds(
            self._blocks,
            self._settings.reconstruct,
            self._segmented,
            frontiers,
            store,
            commits,
            self._grids,
            fitted=self._fitted,
            judging=self._held_out or self._fitted,
            quantizers=self._settings.quantizers,
            weights=self._weight,
            fingerprint=lambda block: digest.of(block.name, block.layers),
        )

    def _weight(self, name: str) -> Tensor | None:
        """The quantized path's value of a parameter, kept until the next segment."""
        if name not in self._current and name in self._grids:
            group = next((group for group in self._done if name in group.layers), None)
            if group is not None:
                self._current[name] = group.weight(name)
        if name in self._biases:
            group = next((group for group in self._done if self._biases[name] in group.biases), None)
            if group is not None:
                return group.biases[self._biases[name]]
        return self._current.get(name, self._fixed.get(name))

    def _solve(self, group: RoundedGroup, plan: GroupPlan, frontiers: Frontiers) -> dict[str, LayerResult]:
        """Measure a group's input, and round its layers."""
        weights = [self._parameters[layer.name] for layer in group.layers]
        parts: dict[str, list[LayerResult]] = {layer.name: [] for layer in group.layers}
        for part in range(group.layers[0].groups):
            layers = LayerGroup(group.layers, weights, part)
            with _scratch(self._folder / "moments") as scratch:
                with self._timed("moments"):
                    fitted, judge = self._measure(layers, group, plan, frontiers, scratch)
                _require_finite(group, fitted)
                first = 0
                for layer, weight in zip(group.layers, weights, strict=True):
                    rows = layer.rows_of_group(part)
                    own = weight[rows].flatten(1).float()
                    bias = self._bias(layer)
                    channels = Channels(slice(first, first + len(own)), own, None if bias is None else bias[rows])
                    grid = self._grids[layer.name].rows(rows)
                    with self._timed("solve"):
                        result = solve(fitted, judge, channels, grid, self._settings.solver, plan.workspace)
                    parts[layer.name].append(result)
                    first += len(own)
        return {layer.name: join(parts[layer.name], self._bias(layer)) for layer in group.layers}

    def _bias(self, layer: RoundedLayer) -> Tensor | None:
        """The layer's bias, if it may change."""
        return self._parameters[layer.bias].float() if layer.bias in self._biases else None

    def _measure(
        self, layers: LayerGroup, group: RoundedGroup, plan: GroupPlan, frontiers: Frontiers, scratch: Path
    ) -> tuple[Measured, Measured | None]:
        """Moments of the samples that codes are fitted to, and of those that judge."""

        def measure(moments: MomentsPlan, samples: Sequence[int], name: str) -> Measured:
            source = _source(frontiers, group, samples)
            if not any(layer.bias in self._biases for layer in group.layers):
                return Measured(_measure(layers, plan, moments, source, scratch, name))
            with_means = MeanSource(layers, source)
            return Measured(_measure(layers, plan, moments, with_means, scratch, name), with_means.means())

        fitted = measure(plan.moments, self._fitted, "fitted")
        return fitted, measure(plan.held_out, self._held_out, "held_out") if plan.held_out is not None else None

    def _output_sqnr_db(self, frontiers: Frontiers) -> float:
        """Run the graph to its end."""
        judged = self._held_out or self._fitted
        found = []
        for sample, outputs in enumerate(frontiers.outputs(self._weight)):
            if sample in judged and QUANTIZED in outputs:
                pairs = zip(outputs[FLOATING], outputs[QUANTIZED], strict=True)
                found.append([(reference, value) for reference, value in pairs])
        if not found:
            return math.nan
        return min(
            sqnr_db(torch.stack([pair[0] for pair in output]), torch.stack([pair[1] for pair in output]))
            for output in zip(*found, strict=True)
        )


class _Digest:
    """What decides a group's codes, as a hash: settings, weights, grids, samples."""

    def __init__(
        self,
        settings: AdaRoundSettings,
        parameters: Mapping[str, Tensor],
        grids: Mapping[str, CodeGrid],
        fixed: Mapping[str, Tensor],
    ) -> None:
        # Memory decides how, not what; what differs in the last bits is no reason to begin anew.
        text = json.dumps({**asdict(settings), "budget_bytes": 0, "version": _VERSION}, sort_keys=True)
        self._hash = hashlib.sha256(text.encode())
        for name, tensor in [*parameters.items(), *fixed.items()]:
            self._add(name, tensor)
        for name, grid in grids.items():
            self._add(f"{name} {grid.bitwidth} {grid.symmetric} {grid.per_tensor}", grid.scale)
            self._add(name, grid.lowest)

    def following(self, samples: Samples) -> Iterator[dict[str, Tensor]]:
        """The samples, taken note of in passing."""
        for sample in samples:
            for name, tensor in sample.items():
                self._add(name, tensor)
            yield sample

    def of(self, place: int | str, layers: Sequence[RoundedLayer]) -> str:
        """Of one group or block.

        Args:
            place: Index of the group, or name of the block.
            layers: Of it.
        """
        own = self._hash.copy()
        own.update(f"{place} {[layer.name for layer in layers]}".encode())
        return own.hexdigest()

    def _add(self, name: str, tensor: Tensor) -> None:
        self._hash.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
        self._hash.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _require_finite(group: RoundedGroup, fitted: Measured) -> None:
    if not fitted.moments.diagonal.isfinite().all():
        raise UsageError(
            f"the input of `{group.layers[0].name}` is so large that its squares are no numbers in float32",
            hint="check the model and the calibration data in fp32",
        )


def _source(frontiers: Frontiers, group: RoundedGroup, samples: Sequence[int]) -> Source:
    return lambda: frontiers.inputs_of(group, samples)


def _measure(
    layers: LayerGroup, plan: GroupPlan, moments: MomentsPlan, source: Source, scratch: Path, name: str
) -> Moments:
    """Take moments in the form that was planned."""
    if moments.mode == "offsets":
        return OffsetMoments(layers, source, plan.chunk)
    if moments.mode == "gram":
        return (gram_by_offsets if by_offsets(layers.layers) else GramMoments.of)(layers, source, plan.chunk)
    folder = scratch / name
    folder.mkdir()
    if moments.mode == "panel":
        return PanelMoments(layers, source, folder, plan.chunk, plan.pass_columns)
    return RowMoments(layers, source, folder, plan.chunk, plan.pass_columns, moments.rows)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder for a block."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
