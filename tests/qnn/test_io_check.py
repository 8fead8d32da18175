"""A context takes and gives what its graph does, and answers differently to different inputs."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from sdconvert.errors import CompileError
from sdconvert.export.artifact import GraphTensor
from sdconvert.qnn.context import Context
from sdconvert.qnn.io_check import require_answers_differ, require_io
from sdconvert.qnn.simulator import Simulator

Compiled = Callable[[str, str], Context]


def exported(context: Context) -> list[GraphTensor]:
    return [
        *(GraphTensor(one.name, "input", one.dtype, one.shape) for one in context.inputs),
        *(GraphTensor(one.name, "output", one.dtype, one.shape) for one in context.outputs),
    ]


def test_a_context_has_the_inputs_and_outputs_of_its_graph(compiled: Compiled) -> None:
    context = compiled("matmul_u16_s16", "SM8650")
    require_io(context, exported(context))


def test_another_order_is_refused(compiled: Compiled) -> None:
    context = compiled("matmul_u16_s16", "SM8650")
    first, second, *rest = exported(context)
    with pytest.raises(CompileError, match="the inputs of `.*_qnn.bin` differ from .* from number 1 on"):
        require_io(context, [second, first, *rest])


def test_an_output_that_is_missing_or_has_another_shape_is_refused(compiled: Compiled) -> None:
    context = compiled("conv", "SM8650")
    *inputs, output = exported(context)
    with pytest.raises(CompileError, match="the outputs of"):
        require_io(context, [*inputs, output, replace(output, name="z")])
    with pytest.raises(CompileError, match="the outputs of"):
        require_io(context, [*inputs, replace(output, shape=(1, 4))])


def test_a_graph_that_always_answers_the_same_is_found(compiled: Compiled) -> None:
    simulator = Simulator(compiled("conv", "SM8650").ctx_onnx)
    inputs = [{"x": torch.full((1, 4, 16, 16), value)} for value in (0.1, 0.5, 0.1)]
    answers = [simulator(one) for one in inputs]
    require_answers_differ("conv", inputs, answers)
    with pytest.raises(CompileError, match="the conv graph gives the same answer to held-out inputs 1 and 2"):
        require_answers_differ("conv", inputs, [answers[0]] * 3)
