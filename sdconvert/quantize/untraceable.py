"""Which module of a model `torch.export` stopped at: its own errors name a line of torch."""

import io
from contextlib import ExitStack, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from sdconvert.errors import SdconvertError, UnsupportedModelError

# What a program raises that meets tensors without values; torch's own errors descend from these.
_UNTRACEABLE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def export_or_name_module(module: nn.Module, inputs: tuple[Tensor, ...], name: str) -> ExportedProgram:
    """Export a graph.

    Args:
        module: From `ModelAdapter.as_graph`.
        inputs: Its inputs.
        name: Of the graph, for messages.

    Raises:
        UnsupportedModelError: The program depends on values of tensors, or does what cannot be traced; the innermost
            module is named.
    """
    try:
        # torch prints the graph so far, whole.
        with redirect_stderr(io.StringIO()):
            return torch.export.export(module, inputs, strict=False)
    except SdconvertError:
        raise
    except _UNTRACEABLE as error:
        path, cls = _where(module, inputs)
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModelError(
            f"`{path}` ({cls}) of the {name} cannot be traced: {reason}",
            hint="a phone's graph is fixed: no branch, index or number may depend on a tensor's values. Write the "
            "module without, for instance with torch.where, or attach a patch that does; with a part that has no graph "
            "there is neither a file to compile nor AdaRound",
        ) from error


def _where(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[str, str]:
    """Path and class of the module whose forward was the last to begin and not end."""
    running: list[tuple[str, str]] = []
    with ExitStack() as stack:
        for path, child in module.named_modules():
            entry = path.removeprefix("model").removeprefix(".") or "the model", type(child).__name__
            enter = child.register_forward_pre_hook(lambda *_, entry=entry: running.append(entry))
            leave = child.register_forward_hook(lambda *_: _pop(running))
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        try:
            with redirect_stderr(io.StringIO()):
                torch.export.export(module, inputs, strict=False)
        except _UNTRACEABLE:
            return running[-1] if running else ("the model", type(module).__name__)
    return "the model", type(module).__name__


def _pop(running: list[Any]) -> None:
    running.pop()
