"""What the HTP computes, pinned: the compiled file is run in Qualcomm's simulator and compared in dB."""

import shutil
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from qdq_graph import conv_silu_conv

from sdconvert.errors import CompileError, UsageError
from sdconvert.qnn.context import Context
from sdconvert.qnn.session import compiling_session
from sdconvert.qnn.simulator import Simulator

Compiled = Callable[[str, str], Context]


def sqnr(reference: torch.Tensor, other: torch.Tensor) -> float:
    error = (reference.double() - other.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / error))


def draw(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-4, 4)


def on_cpu(graph: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """ONNX Runtime's CPU as written: its optimizations would change 16-bit Q/DQ numerics."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])


@pytest.mark.parametrize(("soc", "at_least"), [("SM8650", 70), ("SM8550", 70), ("SM8750", 70), ("SM8475", 50)])
def test_conv_w8a16_computes_what_the_graph_says(compiled: Compiled, tmp_path: Path, soc: str, at_least: float) -> None:
    inputs = {"x": draw((1, 4, 16, 16))}
    answer = Simulator(compiled("conv", soc).ctx_onnx)(inputs)
    assert list(answer) == ["y"]
    assert sqnr(on_cpu(conv_silu_conv(tmp_path / "conv.onnx"), inputs), answer["y"]) >= at_least


def test_keys_and_values_keep_16_bits_only_as_symmetric_int16(compiled: Compiled) -> None:
    """HTP reduces a second MatMul operand of uint16 to 8 bits in silence; as symmetric int16 it is kept (V73+)."""
    inputs = {"q": draw((1, 2, 64, 64), 1), "k": draw((1, 2, 64, 64), 2)}
    exact = inputs["q"] @ inputs["k"]
    trapped = sqnr(exact, Simulator(compiled("matmul_u16_u16", "SM8650").ctx_onnx)(inputs)["y"])
    kept = sqnr(exact, Simulator(compiled("matmul_u16_s16", "SM8650").ctx_onnx)(inputs)["y"])
    assert 38 < trapped < 45
    assert kept >= 70


def test_group_norm_is_accepted_and_exact(compiled: Compiled) -> None:
    x = draw((1, 16, 8, 8))
    answer = Simulator(compiled("group_norm", "SM8650").ctx_onnx)({"x": x})["y"]
    assert sqnr(torch.nn.functional.group_norm(x, 4), answer) >= 70


def test_the_reloaded_binary_is_bit_equal_to_the_compiling_session(tmp_path: Path) -> None:
    x = draw((1, 4, 16, 16))
    onnx = conv_silu_conv(tmp_path / "conv.onnx")
    session = compiling_session(onnx, tmp_path / "conv.ctx.onnx", 57, 3, tmp_path)
    reloaded = Simulator(tmp_path / "conv.ctx.onnx")
    assert torch.equal(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), reloaded({"x": x})["y"])


def test_one_session_answers_again_and_tells_its_time(compiled: Compiled) -> None:
    simulator = Simulator(compiled("conv", "SM8650").ctx_onnx)
    first, second = (simulator({"x": draw((1, 4, 16, 16), seed)})["y"] for seed in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, simulator({"x": draw((1, 4, 16, 16), 0)})["y"])
    assert simulator.seconds > 0


def test_loading_leaves_stdout_alone(compiled: Compiled, capfd: pytest.CaptureFixture[str]) -> None:
    Simulator(compiled("conv", "SM8650").ctx_onnx)({"x": draw((1, 4, 16, 16))})
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    "inputs", [{}, {"x": torch.zeros(1, 4, 8, 8)}, {"x": torch.zeros(1, 4, 16, 16), "z": torch.zeros(1)}]
)
def test_inputs_that_are_not_the_graphs_are_refused(compiled: Compiled, inputs: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UsageError, match="the context takes"):
        Simulator(compiled("conv", "SM8650").ctx_onnx)(inputs)


def test_a_missing_context_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no EPContext model"):
        Simulator(tmp_path / "none.ctx.onnx")


@pytest.mark.parametrize("size", [None, 30_000], ids=["missing", "truncated"])
def test_a_binary_that_cannot_be_loaded_is_a_compile_error(
    compiled: Compiled, tmp_path: Path, size: int | None
) -> None:
    context = compiled("conv", "SM8650")
    if size is not None:
        (tmp_path / context.bin.name).write_bytes(context.bin.read_bytes()[:size])
    with pytest.raises(CompileError, match=r"conv\.ctx\.onnx` cannot be loaded"):
        Simulator(Path(shutil.copy(context.ctx_onnx, tmp_path)))
