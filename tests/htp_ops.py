"""Single ops over the ranges that Stable Diffusion has, from calibration to Qualcomm's HTP simulator.

All cases stand side by side in one graph, one output each, so that a generation costs one compile. Tests and
`benchmarks/ops_on_htp.py` share them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import onnx
import torch
from static_graphs import ModuleAdapter
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from sdconvert.adapters import Tensors
from sdconvert.export.compiler_graph import graph_for_compiler
from sdconvert.metrics import sqnr_db
from sdconvert.qnn.context import compile_context
from sdconvert.qnn.simulator import Simulator
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Simulation
from sdconvert.soc import find_soc

SOCS = {68: "SM8350", 69: "SM8450", 73: "SM8550", 75: "SM8650", 79: "SM8750", 81: "SM8850"}
"""One SoC per generation."""
HIDDEN = -100.0
"""What a mask adds to scores that it hides."""


class Op(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


@dataclass(frozen=True)
class OpCase:
    """One op, and what draws its inputs."""

    op: str
    module: nn.Module
    draw: Callable[[Generator], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Agreement:
    """SQNR in dB of one case."""

    op: str
    simulator_vs_simulation: float
    simulator_vs_fp32: float
    simulation_vs_fp32: float


def values(limit: float, *shape: int) -> Callable[[Generator], tuple[Tensor, ...]]:
    """Within +-limit, most near zero."""
    return lambda generator: ((torch.randn(shape, generator=generator) / 3).clamp(-1, 1) * limit,)


def channels(axis: int, spread: float, offset: float, *shape: int) -> Callable[[Generator], tuple[Tensor, ...]]:
    """Channels whose deviations differ by `spread` times, and whose means are `offset` deviations away from zero."""
    fixed = Generator().manual_seed(9)
    view = [1] * len(shape)
    view[axis] = shape[axis]
    deviation = spread ** torch.rand(shape[axis], generator=fixed).view(view)
    mean = offset * torch.randn(shape[axis], generator=fixed).view(view) * deviation
    return lambda generator: (torch.randn(shape, generator=generator) * deviation + mean,)


def queries_and_keys(score: float, tokens: int, keys: int, spread: float) -> Callable[[Generator], tuple[Tensor, ...]]:
    """(1, 1, tokens, 40) and (1, 1, 40, keys), whose products reach +-score / 2."""
    make_keys = channels(2, spread, 0.5, 1, 1, 40, keys)

    def draw(generator: Generator) -> tuple[Tensor, ...]:
        (key,) = make_keys(generator)
        query = torch.randn(1, 1, tokens, 40, generator=generator)
        return query * (score / 2 / (query @ key).abs().max()), key

    return draw


def scores_and_values(score: float, tokens: int, keys: int, spread: float) -> Callable[[Generator], tuple[Tensor, ...]]:
    """Scores (1, 1, tokens, keys) within +-score / 2, and values (1, 1, keys, 40)."""
    make_scores, make_values = values(score / 2, 1, 1, tokens, keys), channels(3, spread, 1, 1, 1, keys, 40)
    return lambda generator: (*make_scores(generator), *make_values(generator))


def masked_attention(score: float, keys: int) -> Callable[[Generator], tuple[Tensor, ...]]:
    """Queries, keys and values, and a mask that hides a quarter of the keys."""
    make_keys, make_values = queries_and_keys(score, keys, keys, 1), channels(3, 3, 1, 1, 1, keys, 40)
    mask = torch.zeros(1, 1, 1, keys)
    mask[..., -(keys // 4) :] = HIDDEN
    return lambda generator: (*make_keys(generator), *make_values(generator), mask)


def normed(norm: nn.GroupNorm | nn.LayerNorm) -> nn.Module:
    """A norm with weights and biases as trained ones have."""
    generator = Generator().manual_seed(5)
    norm.weight.data = 1 + 0.5 * torch.randn(norm.weight.shape, generator=generator)
    norm.bias.data = 0.5 * torch.randn(norm.bias.shape, generator=generator)
    return norm


def attend(scores: Tensor, value: Tensor) -> Tensor:
    return scores.softmax(-1) @ value


def cases(*, whole: bool) -> dict[str, OpCase]:
    """Cases by the name of their output; of the slow ones only where `whole`."""
    found: dict[str, OpCase] = {}

    def add(op: str, about: str, module: nn.Module, draw: Callable[[Generator], tuple[Tensor, ...]]) -> None:
        found[f"out_{op}_{about}"] = OpCase(op, module, draw)

    # Channels, groups, rows and columns, spread of deviations, means.
    groups = [(320, 32, 4, 30, 1), (64, 8, 16, 30, 3), (64, 8, 16, 1, 3), *([(32, 8, 64, 30, 1)] if whole else ())]
    for width, count, size, spread, offset in groups:
        draw = channels(1, spread, offset, 1, width, size, size)
        add("group_norm", f"{size * size}_{spread}_{offset}", normed(nn.GroupNorm(count, width)), draw)
    for width, rows, spread, offset in [(320, 16, 30, 1), (64, 77, 1, 3), *([(64, 4096, 30, 1)] if whole else ())]:
        then = nn.Sequential(normed(nn.LayerNorm(width)), nn.Linear(width, 32))
        torch.nn.init.normal_(then[1].weight, generator=Generator().manual_seed(6))
        draw = channels(2, spread, offset, 1, rows, width)
        add("layer_norm", f"{rows}_{spread}_{offset}", then[0], draw)
        add("layer_norm_linear", f"{rows}_{spread}_{offset}", then, draw)
    for limit in (1, 3, 6, 10, 20) if whole else (1, 20):
        add("gelu", f"{limit}", Op(F.gelu), values(limit, 1, 77, 64))
        add("gelu_tanh", f"{limit}", Op(lambda x: F.gelu(x, approximate="tanh")), values(limit, 1, 77, 64))
        add("silu", f"{limit}", Op(F.silu), values(limit, 1, 32, 12, 12))
    many = 4096 if whole else 1024
    for score, keys in ((5, 77), (5, many), (20, many), (60, many)):
        add("softmax", f"{score}_{keys}", Op(lambda x: x.softmax(-1)), values(score / 2, 1, 1, 64, keys))
        add("p_v", f"{score}_{keys}", Op(attend), scores_and_values(score, 64, keys, 3))
        add("q_k", f"{score}_{keys}", Op(torch.matmul), queries_and_keys(score, 64, keys, 3))
    for score in (5, 20, 60):
        masked = Op(lambda q, k, v, mask: attend(q @ k + mask, v))
        add("attention", f"{score}_masked", masked, masked_attention(score, 77))
    return found


class _SideBySide(nn.Module):
    def __init__(self, modules: list[nn.Module], counts: list[int]) -> None:
        super().__init__()
        self.ops, self.counts = nn.ModuleList(modules), counts

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        rest = iter(inputs)
        return tuple(op(*islice(rest, count)) for op, count in zip(self.ops, self.counts, strict=True))


class _Adapter(ModuleAdapter):
    names: tuple[str, ...] = ()

    def graph_forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.model(*inputs)
        return outputs

    def output_names(self, count: int) -> tuple[str, ...]:
        return self.names


class OpsOnHtp:
    """All cases as a quantized graph of one group of generations, and as its ONNX file.

    Args:
        every: The cases.
        arch: A generation of the group.
        folder: Where files go.
        changes: To the group's settings, to show what they are for.
    """

    def __init__(
        self, every: Mapping[str, OpCase], arch: int, folder: Path, changes: Mapping[str, Any] | None = None
    ) -> None:
        samples = [self._inputs(every, seed) for seed in range(3)]
        counts = [len(case.draw(Generator())) for case in every.values()]
        adapter = _Adapter(_SideBySide([case.module for case in every.values()], counts).eval())
        adapter.names = tuple(every)
        simulation = Simulation(adapter, samples[0], load_settings({arch}).model_copy(update=changes))
        simulation.calibrate(samples)
        self._ops = {name: case.op for name, case in every.items()}
        self._folder, self._inputs_of_one, self.onnx = folder, samples[0], folder / "ops.onnx"
        self._fp32, self._simulated = adapter.run(samples[0]), simulation(samples[0])
        folder.mkdir(parents=True)
        onnx.save(graph_for_compiler(simulation, samples[0]), str(self.onnx))

    @staticmethod
    def _inputs(every: Mapping[str, OpCase], seed: int) -> Tensors:
        generator = Generator().manual_seed(seed)
        return {
            f"in_{name}_{index}": tensor
            for name, case in every.items()
            for index, tensor in enumerate(case.draw(generator))
        }

    def measure(self, soc: str) -> dict[str, Agreement]:
        """Compile for a SoC, run in the simulator, and compare every output.

        Raises:
            CompileError: The compiler refuses a case.
        """
        context = compile_context(self.onnx, self._folder / soc, find_soc(soc))
        answer = Simulator(context.ctx_onnx)(self._inputs_of_one)
        return {
            name: Agreement(
                self._ops[name],
                sqnr_db(simulated, answer[name]),
                sqnr_db(self._fp32[name], answer[name]),
                sqnr_db(self._fp32[name], simulated),
            )
            for name, simulated in self._simulated.items()
        }
