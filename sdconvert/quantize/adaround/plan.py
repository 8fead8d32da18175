"""What AdaRound of a graph will take, from shapes alone: which moments are kept where, and the peak of memory.

One budget covers all that grows with the model's shapes: the tensors of one sample while it runs, the store's share
in memory, the moments and what a solver needs. Not in it: the runtime, the model's own weights, the calibration data
that the caller holds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sdconvert.errors import BudgetError, PreconditionError
from sdconvert.quantize.adaround.blocks import Block
from sdconvert.quantize.adaround.layers import RoundedLayer
from sdconvert.quantize.adaround.offsets import ASSEMBLY_ROWS, MATRICES, by_offsets
from sdconvert.quantize.adaround.solve import LEAST_ROW_ARRAYS, SolverSettings, Workspace
from sdconvert.quantize.adaround.steps import SCORES_BYTES, RoundedGroup, SegmentedGraph, size
from sdconvert.quantize.adaround.tiles import WIDTH

Mode = Literal["gram", "offsets", "rows", "panel"]
MIB = 1 << 20
_FLOAT = 4
_INPUTS = 4  # tensors of the size of a layer's input while it is measured
_BLOCK_ROW_ARRAYS = 12  # matrices (channels, block) beside those of the whole layer while GPTQ works on a block
_BLOCK_ARRAYS = 8  # matrices (block, block), those of LAPACK included
_RESERVE = 1 / 32  # of a budget: what libraries keep for matrix products, and blocks too small to be counted
_CODE_BYTES = 4  # of each weight of the layer: its code, and the nearest one
_MOST_CHUNK, _LEAST_CHUNK = 1024, 16
_LEAST_CHANNELS = 8
_SMALL_GRAM = 64 * MIB
_MOST_BLOCK = 1024  # after descent, larger blocks of GPTQ give no smaller loss, and take cubic time
_QUANTIZER_VALUES = 4  # tensors that a quantizer keeps for the way back, masks and chance included
_BACKWARD_ARRAYS = 4  # gradients on the way back, of the largest value
_STATE_ARRAYS = 14  # of each weight of a block: codes, what Adam holds, the candidates
_WEIGHT_ARRAYS = 8  # of the weight whose rounding is just computed


@dataclass(frozen=True)
class MomentsPlan:
    """How the moments of one group's samples are kept.

    Attributes:
        mode: `gram` in memory; `offsets` in memory what a 3x3 convolution's G is made of, a third of it; `panel` G on
            disk; `rows` the inputs on disk.
        rows: Of the data.
        memory_bytes: Held in memory until the group is solved.
        disk_bytes: Held on disk.
    """

    mode: Mode
    rows: int
    memory_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class GroupPlan:
    """How one group is solved.

    Attributes:
        layers: They share an input.
        input: The value's name in the graph.
        moments: Of the samples that codes are fitted to.
        held_out: Of those that judge; None without any.
        chunk: Rows that are looked at together.
        pass_columns: Columns that one pass over the data makes, on disk.
        workspace: Of the solver.
        peak_bytes: In memory at most, while the group is measured and solved.
    """

    layers: tuple[RoundedLayer, ...]
    input: str
    moments: MomentsPlan
    held_out: MomentsPlan | None
    chunk: int
    pass_columns: int
    workspace: Workspace
    peak_bytes: int


@dataclass(frozen=True)
class BlockPlan:
    """How one block is reconstructed.

    Attributes:
        name: Of the block.
        layers: How many are rounded together.
        peak_bytes: In memory at most, while it is trained.
        stored_bytes: In the store for one sample, as float32, beyond what waits there anyway.
    """

    name: str
    layers: int
    peak_bytes: int
    stored_bytes: int


@dataclass(frozen=True)
class Plan:
    """What will be done, and what it takes in bytes.

    Attributes:
        groups: In execution order.
        samples: Calibration samples.
        held_out: How many of them only judge.
        sample_bytes: The tensors of one sample, at the widest place of the graph, and the largest group's weights.
        store_bytes: What the store may hold in memory.
        peak_bytes: In memory, beside runtime and weights.
        disk_bytes: In the scratch folder, at most.
        blocks: In execution order; none without reconstruction.
    """

    groups: tuple[GroupPlan, ...]
    samples: int
    held_out: int
    sample_bytes: int
    store_bytes: int
    peak_bytes: int
    disk_bytes: int
    blocks: tuple[BlockPlan, ...] = ()

    def describe(self) -> str:
        """A few lines for a user."""
        modes: dict[str, int] = {}
        for group in self.groups:
            modes[group.moments.mode] = modes.get(group.moments.mode, 0) + len(group.layers)
        layers = ", ".join(f"{count} {mode}" for mode, count in modes.items())
        widest = max(self.groups, key=lambda group: group.peak_bytes)
        largest = max(self.blocks, key=lambda block: block.peak_bytes, default=None)
        training = f", block `{largest.name}` {largest.peak_bytes / MIB:.0f}" if largest else ""
        blocks = f", {sum(block.layers for block in self.blocks)} again in {len(self.blocks)} blocks" if largest else ""
        return (
            f"AdaRound of {sum(modes.values())} layers in {len(self.groups)} groups ({layers}){blocks}, "
            f"{self.samples} samples, {self.held_out} of them held out\n"
            f"memory {self.peak_bytes / MIB:.1f} MiB at most (one sample {self.sample_bytes / MIB:.0f}, moments of "
            f"`{widest.layers[0].name}` {widest.peak_bytes / MIB:.0f}{training}, store {self.store_bytes / MIB:.0f}), "
            f"disk {self.disk_bytes / MIB:.1f} MiB"
        )


def make_plan(
    segmented: SegmentedGraph,
    *,
    samples: int,
    held_out: int,
    budget_bytes: int,
    item_bytes: int = 2,
    row_arrays: int = SolverSettings().row_arrays,
    blocks: Sequence[Block] = (),
    quantizers: bool = False,
) -> Plan:
    """Plan AdaRound of a graph.

    Args:
        segmented: The graph.
        samples: Calibration samples.
        held_out: How many of them only judge.
        budget_bytes: Memory for everything beside runtime and weights.
        item_bytes: Of a float in the store.
        row_arrays: Of the solver: matrices (channels, columns) that it has at once.
        blocks: That are reconstructed.
        quantizers: The graph's quantizers are active while they are.

    Raises:
        PreconditionError: There are no samples to fit codes to.
        BudgetError: A layer, a block, or one sample, does not fit.
    """
    if samples - held_out < 1:
        raise PreconditionError(
            f"{samples} calibration samples, {held_out} of them held out", hint="AdaRound fits codes to one or more"
        )
    # While a segment runs, rounded weights of the group before it are there beside the model's own.
    rounded = max(sum(_FLOAT * one.out_channels * one.columns for one in group.layers) for group in segmented.groups)
    sample_bytes = _sample_bytes(segmented) + rounded
    block_plans = tuple(_plan_block(block, quantizers=quantizers) for block in blocks)
    stored = max((block.stored_bytes for block in block_plans), default=0) // _FLOAT
    frontier = samples * (_frontier_items(segmented) + stored) * item_bytes
    usable = int(budget_bytes * (1 - _RESERVE))
    # Disk serves the store well, as it is read in order; moments are faster in memory.
    store_bytes = min(frontier, usable // 4, usable - sample_bytes)
    if store_bytes < 0:
        needed = _with_reserve(sample_bytes)
        raise BudgetError(
            f"one sample takes {needed / MIB:.1f} MiB where the graph is widest, beside rounded weights, "
            f"the budget is {budget_bytes / MIB:.1f} MiB",
            hint=f"give at least {needed / MIB:.1f} MiB, or calibrate on smaller tiles",
        )
    counts = samples - held_out, held_out
    for block in block_plans:
        if block.peak_bytes + store_bytes > usable:
            needed = _with_reserve(block.peak_bytes + store_bytes)
            raise BudgetError(
                f"the {block.layers} layers of block `{block.name}` need {needed / MIB:.1f} MiB together, "
                f"the budget is {budget_bytes / MIB:.1f} MiB",
                hint=f"give at least {needed / MIB:.1f} MiB, reconstruct smaller blocks, or leave it at moments",
            )
    available = usable - store_bytes
    groups = [_plan_group(group, counts, row_arrays, available, budget_bytes) for group in segmented.groups]
    tiles = max((g.moments.disk_bytes + (g.held_out.disk_bytes if g.held_out else 0) for g in groups), default=0)
    peak = _with_reserve(
        store_bytes + max([sample_bytes, *(one.peak_bytes for one in groups), *(one.peak_bytes for one in block_plans)])
    )
    disk = max(0, frontier - store_bytes) + tiles
    return Plan(tuple(groups), samples, held_out, sample_bytes, store_bytes, peak, disk, block_plans)


def _with_reserve(size: int) -> int:
    return math.ceil(size / (1 - _RESERVE))


def _plan_block(block: Block, *, quantizers: bool) -> BlockPlan:
    """What training takes: one sample's values for the way back, and the state of every weight."""
    sizes = [
        (_QUANTIZER_VALUES if quantizers else 0) * size(node) if node.op == "call_module" else size(node)
        for step in block.steps
        for node in step.nodes
    ]
    values = sum(sizes) + _BACKWARD_ARRAYS * max(sizes) + block.stored_bytes
    weights = [_FLOAT * layer.out_channels * layer.columns for layer in block.layers]
    training = values + _STATE_ARRAYS * sum(weights) + _WEIGHT_ARRAYS * max(weights)
    return BlockPlan(block.name, len(block.layers), training, block.stored_bytes)


def _sample_bytes(segmented: SegmentedGraph) -> int:
    """The most that the values of one path take while a segment runs, and what an op holds beside them."""
    most = 0
    for index, segment in enumerate(segmented.segments):
        live = {node: size(node) for node in segmented.reads[index]}
        for position, step in enumerate(segment):
            attends = len(step.nodes) > 1
            scores = 2 * min(SCORES_BYTES, size(step.nodes[0])) if attends else 0
            scratch = max([scores, *(size(node) for node in step.inputs)])
            live[step.output] = size(step.output)
            most = max(most, sum(live.values()) + scratch)
            for node in segmented.last_reads[index].get(position, ()):
                del live[node]
    return most


def _frontier_items(segmented: SegmentedGraph) -> int:
    """The most numbers that wait for later segments, of one sample on both paths."""
    left = dict(segmented.uses)
    waiting = {node: size(node) // _FLOAT for node in segmented.inputs if node in left}
    most = sum(waiting.values())
    for index, segment in enumerate(segmented.segments):
        # The old frontier goes sample by sample while the new one comes.
        for step in segment:
            if step.output in left:
                waiting[step.output] = size(step.output) // _FLOAT
        for node in segmented.reads[index]:
            left[node] -= 1
            if not left[node]:
                waiting.pop(node, None)
        most = max(most, sum(waiting.values()))
    return 2 * most


def _plan_group(
    group: RoundedGroup, samples: tuple[int, int], row_arrays: int, available: int, budget: int
) -> GroupPlan:
    """The fastest form that fits: moments in memory, else those of the held-out samples on disk, else all.

    Where there are few rows for many columns, the rows themselves are the fastest: a sweep of descent multiplies the
    weight with them twice, and with G once.
    """
    shape = _Shape.of(group)
    in_memory: list[Mode] = ["gram", "offsets"] if shape.by_offsets else ["gram"]
    disk = [_moments(shape, count, _disk_mode(shape, count)) for count in samples if count]
    memory = [[_moments(shape, count, mode) for count in samples if count] for mode in in_memory]
    forms = [*memory, *([form[0], *disk[1:]] for form in memory if disk[1:]), disk]
    if 2 * shape.rows * samples[0] < shape.columns and memory[0][0].memory_bytes > _SMALL_GRAM:
        forms.insert(0, disk)
    least = 0
    for form in forms:
        plan = _fit(group, shape, form, row_arrays, available)
        if isinstance(plan, GroupPlan):
            return plan
        least = plan
    needed = _with_reserve(least) + budget - _with_reserve(available)
    raise BudgetError(
        f"`{group.layers[0].name}` with {shape.columns} inputs per output needs {needed / MIB:.1f} MiB, "
        f"the budget is {budget / MIB:.1f} MiB",
        hint=f"give at least {needed / MIB:.1f} MiB, or round this layer to nearest",
    )


@dataclass(frozen=True)
class _Shape:
    """Of a group: inputs per output, output channels of all and of the largest layer, rows per sample, `by_offsets`."""

    columns: int
    channels: int
    largest: int
    rows: int
    by_offsets: bool

    @classmethod
    def of(cls, group: RoundedGroup) -> "_Shape":
        counts = [layer.out_channels // layer.groups for layer in group.layers]
        columns = group.layers[0].columns
        return cls(columns, sum(counts), max(counts), rows_per_sample(group), by_offsets(group.layers))

    @property
    def offset_bytes(self) -> int:
        """What G is made of, and what putting a panel of it together takes; 0 where there is no such."""
        channels = self.columns // 9
        return _FLOAT * (MATRICES * channels**2 + ASSEMBLY_ROWS * self.columns) if self.by_offsets else 0


def _fit(
    group: RoundedGroup, shape: _Shape, form: list[MomentsPlan], row_arrays: int, available: int
) -> GroupPlan | int:
    """Share out what moments in a form leave; the least that they need, where that is not there."""
    columns, on_disk = shape.columns, any(one.disk_bytes for one in form)
    longest = max([columns, *(one.rows for one in form if one.mode == "rows")])
    row_bytes = _FLOAT * (3 * columns + 2 * shape.channels)
    column_bytes = _FLOAT * (longest + shape.channels) if on_disk else 0
    block_bytes = _FLOAT * _BLOCK_ARRAYS
    # Of inputs on disk, those of a block's columns are read together for their G.
    gathered = _FLOAT * form[0].rows if form[0].mode == "rows" else 0

    def block_room(block: int) -> int:
        return block_bytes * block**2 + gathered * block

    def channel_room(block: int) -> int:
        return _FLOAT * max(row_arrays * longest, LEAST_ROW_ARRAYS * longest + _BLOCK_ROW_ARRAYS * block)

    # Tiles that are held while others are made or read.
    held = sum(one.memory_bytes for one in form) + 2 * WIDTH * column_bytes + _CODE_BYTES * shape.largest * columns
    channels, block = min(shape.largest, _LEAST_CHANNELS), min(WIDTH, columns)
    # A sample's input on both paths, as it is read and padded; G's parts are there until it is put together.
    reading = _INPUTS * size(group.input) + (shape.offset_bytes if form[0].mode == "gram" else 0)
    measuring = reading + _LEAST_CHUNK * row_bytes + WIDTH * column_bytes
    least = max(measuring, channels * channel_room(block) + block_room(block))
    room = available - held
    if room < least:
        return held + least
    chunk = max(_LEAST_CHUNK, min(_MOST_CHUNK, (room - reading) // 2 // row_bytes))
    pass_columns = columns
    if on_disk:
        pass_columns = max(WIDTH, (room - reading - chunk * row_bytes) // column_bytes // WIDTH * WIDTH)
    for larger in [min(columns, _MOST_BLOCK), *range(_MOST_BLOCK, WIDTH, -WIDTH)]:
        if larger <= columns and block_room(larger) <= room // 2:
            block = larger
            break
    channels = max(channels, min(shape.largest, (room - block_room(block)) // channel_room(block)))
    solving = block_room(block) + channel_room(block) * channels
    measuring = reading + chunk * row_bytes + min(pass_columns, longest) * column_bytes
    return GroupPlan(
        group.layers,
        group.input.name,
        form[0],
        form[1] if len(form) > 1 else None,
        chunk,
        pass_columns,
        Workspace(channels, block),
        held + max(solving, measuring),
    )


def _disk_mode(shape: _Shape, samples: int) -> Mode:
    """The smaller one."""
    return "rows" if shape.rows * samples < shape.columns else "panel"


def _moments(shape: _Shape, samples: int, mode: Mode) -> MomentsPlan:
    columns, channels, rows = shape.columns, shape.channels, shape.rows * samples
    if mode == "gram":
        cross = channels * columns if channels <= columns else 2 * columns**2
        return MomentsPlan(mode, rows, _FLOAT * (columns**2 + cross), 0)
    if mode == "offsets":
        return MomentsPlan(mode, rows, shape.offset_bytes + _FLOAT * channels * columns, 0)
    if mode == "rows":
        return MomentsPlan(mode, rows, 0, rows * (2 * columns + _FLOAT * channels))
    return MomentsPlan(mode, rows, 0, _FLOAT * columns * (columns + channels))


def rows_per_sample(group: RoundedGroup) -> int:
    """Rows that one sample gives: positions of the output."""
    shape = group.nodes[0].meta["val"].shape
    return int(shape.numel()) // int(shape[1] if group.layers[0].convolution else shape[-1])
