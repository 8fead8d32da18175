"""Rounding a block's layers together, by the error of the block's outputs, from where their moments have them.

BRECQ (Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", 2021,
arXiv:2102.05426) trains AdaRound's soft rounding of all weights of a block on its output. With quantizers in the loop,
each activation escapes its quantizer by chance in every step, as in QDrop (Wei et al., "QDrop: Randomly Dropping
Quantization for Extremely Low-bit Post-Training Quantization", 2022, arXiv:2203.05740): the rounding is then flat
around the noise, not fitted to one instance of it.

What is compared is an error over the energy of what it is an error of, summed over the block's outputs. BRECQ weighs
each value by the squared gradient of a task's loss instead; a diffusion model's calibration has no such loss.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx import Node

from sdconvert.quantize.adaround.advance import FLOATING, QUANTIZED, Constants, Frontiers, Weights
from sdconvert.quantize.adaround.blocks import Block, BlockFigures, Kind
from sdconvert.quantize.adaround.code_grid import CodeGrid
from sdconvert.quantize.adaround.soft import Schedule
from sdconvert.quantize.adaround.solve import LayerFigures, LayerResult
from sdconvert.quantize.adaround.steps import SegmentedGraph
from sdconvert.quantize.adaround.store import ActivationStore
from sdconvert.quantize.soft_rounding import GAMMA, ZETA, SoftRoundingBlock

_TARGET = "target "


@dataclass(frozen=True)
class Reconstruction:
    """How blocks are rounded again, after their layers' moments have.

    Attributes:
        kind: `block`: modules; `layer+activation`: layers and the activations behind them.
        paths: Modules that are blocks; without, the outermost ones of at most `largest` layers and one output.
        largest: Layers of a block.
        batch: Samples of a step.
        drop: Probability that a value escapes its quantizer in a step, where quantizers are active.
        confidence: How far from undecided the training begins, of 1: 0 gives both neighbours half, 1 is the code.
        seed: Of the order of samples and of what escapes.
        schedule: Of the training; its regulariser counts per output channel of the block.
    """

    kind: Kind = "block"
    paths: tuple[str, ...] = ()
    largest: int = 12
    batch: int = 4
    drop: float = 0.5
    confidence: float = 0.9
    seed: int = 0
    schedule: Schedule = field(default_factory=lambda: Schedule(iterations=300, learning_rate=0.1))


@dataclass(frozen=True)
class Start:
    """What moments made of a layer.

    Attributes:
        weight: In its own shape.
        codes: (out_channels, columns).
        grid: Of the codes.
        figures: Of the layer.
        bias: That goes with the codes; None: the layer's own.
    """

    weight: Tensor
    codes: Tensor
    grid: CodeGrid
    figures: LayerFigures
    bias: Tensor | None = None


class BlockTask:
    """One block with its data: what goes in on the quantized path, and what came out on the floating-point path.

    Args:
        block: The frontiers stand at its first group.
        segmented: The graph.
        frontiers: On it.
        store: Where the frontiers wait.
        samples: How many there are.
        quantizers: The graph's quantizers are active on the quantized path.
        weights: Of the quantized path, for those that are not the block's own to round.
    """

    def __init__(
        self,
        block: Block,
        segmented: SegmentedGraph,
        frontiers: Frontiers,
        store: ActivationStore,
        *,
        samples: int,
        quantizers: bool,
        weights: Weights,
    ) -> None:
        self.block, self._segmented, self._frontiers, self._store = block, segmented, frontiers, store
        self._samples, self._quantizers, self._weights = samples, quantizers, weights
        frontiers.hold(block.inputs)
        self.energies = {node: torch.zeros(samples, dtype=torch.float64) for node in block.outputs}
        constants = Constants(segmented, None, lambda _: None)
        for sample in range(samples):
            outputs = self.outputs(sample, constants, FLOATING)
            for node, value in outputs.items():
                self.energies[node][sample] = value.double().square().sum()
                store.put((sample, _TARGET + node.name, FLOATING), value, 1)
            frontiers.ops[FLOATING] += len(block.steps)

    def outputs(self, sample: int, constants: Constants, path: str = QUANTIZED) -> dict[Node, Tensor]:
        """The block's outputs of one sample."""
        values = {node: self._frontiers.value(sample, path, node) for node in self.block.inputs}
        for position, step in enumerate(self.block.steps):
            values[step.output] = step.run(values, constants.call)
            for node in self.block.last_reads.get(position, ()):
                del values[node]
        return {node: values[node] for node in self.block.outputs}

    def error(self, sample: int, constants: Constants, mean_energy: Mapping[Node, float]) -> Tensor:
        """Of one sample: squared errors of the outputs over an output's energy in the mean, summed."""
        total = torch.zeros(())
        for node, value in self.outputs(sample, constants).items():
            target = self._store.look((sample, _TARGET + node.name, FLOATING))
            total = total + (value - target).square().sum() / (mean_energy[node] or 1.0)
        return total

    @torch.no_grad()
    def loss(self, own: Mapping[str, Tensor | None], samples: Sequence[int]) -> float:
        """Mean of `error` over samples, quantizers in place.

        Args:
            own: Parameters to compute with, beside those of the quantized path; None: the model's own.
            samples: To judge on.
        """
        constants, energies = Constants(self._segmented, self._quantizers, self._with(own)), self.mean_energy(samples)
        return sum(float(self.error(sample, constants, energies)) for sample in samples) / len(samples)

    def mean_energy(self, samples: Sequence[int]) -> dict[Node, float]:
        """By output: sum of squares on the floating-point path, the mean over samples."""
        return {node: float(energy[list(samples)].mean()) for node, energy in self.energies.items()}

    def backward(
        self, leaves: Mapping[str, Tensor], samples: Sequence[int], mean_energy: Mapping[Node, float], drop: "Drop"
    ) -> float:
        """Add the gradient of the samples' mean error to the weights' `grad`; return the error.

        One sample runs at a time: so much memory, however many there are, and the graph is of one sample anyway.
        """
        total = 0.0
        for sample in samples:
            with torch.enable_grad():
                constants = _Dropping(self._segmented, self._quantizers, self._with(leaves), drop)
                loss = self.error(sample, constants, mean_energy) / len(samples)
            torch.autograd.backward(loss, inputs=list(leaves.values()))
            total += loss.item()
        return total

    def replay(self) -> None:
        """Run the block on the quantized path again, as far as the frontier is, with its weights as they are now."""
        last = self._segmented.groups[self.block.last].nodes[0]
        ends = next(index for index, step in enumerate(self.block.steps) if last in step.nodes)
        constants = Constants(self._segmented, self._quantizers, self._weights)
        for sample in range(self._samples):
            values = {node: self._frontiers.value(sample, QUANTIZED, node) for node in self.block.inputs}
            for step in self.block.steps[:ends]:
                values[step.output] = step.run(values, constants.call)
                self._frontiers.replace(sample, step.output, values[step.output])
        if QUANTIZED in self._frontiers.ops:
            self._frontiers.ops[QUANTIZED] += ends * self._samples

    def _with(self, own: Mapping[str, Tensor | None]) -> Weights:
        return lambda name: own[name] if name in own else self._weights(name)

    def close(self) -> None:
        """Let go of what was held."""
        self._frontiers.release(self.block.inputs)
        for node in self.block.outputs:
            for sample in range(self._samples):
                self._store.release((sample, _TARGET + node.name, FLOATING))


@dataclass(frozen=True)
class Drop:
    """Lets values escape quantizers with a probability."""

    probability: float
    generator: torch.Generator


class _Dropping(Constants):
    """As its base, but values escape their quantizers by chance."""

    def __init__(self, segmented: SegmentedGraph, quantizers: bool, weights: Weights, drop: Drop) -> None:
        super().__init__(segmented, quantizers, weights)
        self._drop = drop

    def quantize(self, quantizer: nn.Module, value: Tensor) -> Tensor:
        quantized = super().quantize(quantizer, value)
        if not self._drop.probability or not value.is_floating_point():
            return quantized
        escapes = torch.rand(value.shape, generator=self._drop.generator) < self._drop.probability
        return torch.where(escapes, value, quantized)


class SoftWeights:
    """Soft roundings of some weights, that begin near given codes.

    Args:
        starts: By name.
        confidence: See `Reconstruction`.
    """

    def __init__(self, starts: Mapping[str, Start], confidence: float) -> None:
        self._starts = starts
        self.blocks: dict[str, SoftRoundingBlock] = {}
        self._hosts: dict[str, nn.Module] = {}
        for name, start in starts.items():
            host = nn.Module()
            matrix = start.weight.reshape(start.grid.scale.numel(), -1)
            host.weight = nn.Parameter(matrix, requires_grad=False)
            block = SoftRoundingBlock("reconstruction", host, start.grid.weight_grid())
            floor = block.grid.to_steps(matrix).floor()
            up = (start.codes.reshape(matrix.shape) - floor).clamp(0, 1)
            # Fully decided values have no gradient: where the sigmoid is cut off, its slope counts for nothing.
            soft = 0.5 + (up - 0.5) * min(confidence, 0.99)
            block.alpha.data = torch.logit((soft - GAMMA) / (ZETA - GAMMA))
            self.blocks[name], self._hosts[name] = block, host

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [block.alpha for block in self.blocks.values()]

    def leaves(self) -> dict[str, Tensor]:
        """The weights as they are now, in their own shapes, for gradients to gather at."""
        with torch.no_grad():
            soft = {name: self._soft(name).reshape(self._starts[name].weight.shape) for name in self.blocks}
        return {name: weight.requires_grad_() for name, weight in soft.items()}

    def backward(self, leaves: Mapping[str, Tensor], beta: float | None, regularization: float) -> None:
        """Bring the weights' gradients to what is trained, with the regulariser's; one weight after another."""
        for name, block in self.blocks.items():
            gradient = leaves[name].grad
            with torch.enable_grad():
                if gradient is not None:
                    soft = self._soft(name)
                    torch.autograd.backward(soft, gradient.reshape(soft.shape))
                if beta is not None and regularization:
                    torch.autograd.backward(regularization * block.regularizer(beta))

    @torch.no_grad()
    def codes(self) -> dict[str, Tensor]:
        """The decisions, as codes (out_channels, columns)."""
        found = {}
        for name, block in self.blocks.items():
            block.hard = True
            start = self._starts[name]
            hard = self._soft(name).reshape(start.codes.shape)
            found[name] = (hard / start.grid.column_scale(hard.shape[1])).round()
            block.hard = False
        return found

    def remove(self) -> None:
        """Take the plugins off."""
        for block in self.blocks.values():
            block.remove()

    def _soft(self, name: str) -> Tensor:
        soft: Tensor = self.blocks[name](self._hosts[name].weight)
        return soft


def train(
    task: BlockTask, starts: Mapping[str, Start], samples: Sequence[int], settings: Reconstruction
) -> dict[str, Tensor]:
    """Train the rounding of a block's weights together.

    Args:
        task: The block with its data.
        starts: Where its weights begin.
        samples: To be fitted to.
        settings: Of the training.

    Returns:
        Codes (out_channels, columns) by weight.
    """
    digest = hashlib.sha256(f"{settings.seed} {task.block.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    soft, schedule = SoftWeights(starts, settings.confidence), settings.schedule
    optimizer = torch.optim.Adam(soft.parameters(), lr=schedule.learning_rate)
    energy, drop = task.mean_energy(samples), Drop(settings.drop, generator)
    channels = sum(_channels(node) for node in task.block.outputs)
    order: list[int] = []
    for iteration in range(schedule.iterations):
        while len(order) < settings.batch:
            order += [samples[index] for index in torch.randperm(len(samples), generator=generator).tolist()]
        batch, order = order[: settings.batch], order[settings.batch :]
        optimizer.zero_grad()
        leaves = soft.leaves()
        task.backward(leaves, batch, energy, drop)
        soft.backward(leaves, schedule.beta_at(iteration), schedule.regularization / channels)
        optimizer.step()
    codes = soft.codes()
    soft.remove()
    return codes


def reconstruct(
    task: BlockTask,
    starts: Mapping[str, Start],
    nearest: Mapping[str, CodeGrid],
    fitted: Sequence[int],
    judging: Sequence[int],
    settings: Reconstruction,
) -> tuple[dict[str, LayerResult], BlockFigures]:
    """Round a block's weights together; of nearest, moments and training, what is best on samples that judge.

    Args:
        task: The block with its data.
        starts: What moments gave.
        nearest: The weights' grids for rounding to nearest.
        fitted: Samples that are fitted to.
        judging: Samples that judge.
        settings: Of the training.
    """
    flat = {name: start.weight.flatten(1) for name, start in starts.items()}
    candidates: dict[Literal["nearest", "moments", "reconstruction"], dict[str, tuple[Tensor, CodeGrid]]] = {
        "moments": {name: (start.codes, start.grid) for name, start in starts.items()},
        "nearest": {name: (grid.nearest(flat[name]), grid) for name, grid in nearest.items()},
        "reconstruction": {
            name: (codes, starts[name].grid) for name, codes in train(task, starts, fitted, settings).items()
        },
    }
    losses = {}
    for kind, candidate in candidates.items():
        weights: dict[str, Tensor | None] = {
            name: grid.dequantize(codes).reshape(starts[name].weight.shape) for name, (codes, grid) in candidate.items()
        }
        if kind == "nearest":  # biases changed for other codes
            weights |= {layer.bias: None for layer in task.block.layers if layer.bias is not None}
        losses[kind] = task.loss(weights, judging)
    # Of equals the first: moments stay unless something is better.
    taken = min(losses, key=losses.__getitem__)
    results, changed = {}, 0
    for name, (codes, grid) in candidates[taken].items():
        off = float((codes != candidates["nearest"][name][0]).float().mean())
        figures = replace(
            starts[name].figures, changed=off, fell_back=taken == "nearest" or starts[name].figures.fell_back
        )
        bias = None if taken == "nearest" else starts[name].bias
        results[name] = LayerResult(codes.to(torch.int16), grid, figures, bias)
        changed += int((codes != starts[name].codes).sum())
    part = changed / sum(weight.numel() for weight in flat.values())
    return results, BlockFigures(
        task.block.name, taken, part, losses["nearest"], losses["moments"], losses["reconstruction"]
    )


def _channels(node: Node) -> int:
    shape = node.meta["val"].shape
    return int(shape[1] if len(shape) == 4 else shape[-1])
