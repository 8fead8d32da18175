"""The compiled file itself, executed: Qualcomm's HTP simulator runs the `.bin` that will be shipped.

What runs here is bit-equal to the session that compiled it; its time is a CPU's, no device figure.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import torch

from sdconvert.errors import UsageError
from sdconvert.qnn.session import context_session


class Simulator:
    """Runs a context binary on float32 tensors under its graph's own names; one session, loaded once.

    Args:
        ctx_onnx: The EPContext model; its `.bin` lies beside it.
        provider: Further options of the backend.

    Raises:
        UsageError: The EPContext model is missing.
        CompileError: Its binary is missing or truncated.
    """

    def __init__(self, ctx_onnx: Path, provider: Mapping[str, str] | None = None) -> None:
        if not ctx_onnx.is_file():
            raise UsageError(f"no EPContext model at `{ctx_onnx}`", hint="compile the graph first")
        self._session = context_session(ctx_onnx, provider)
        self._inputs = {value.name: tuple(value.shape) for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        self.seconds = 0.0
        """Wall time of the last run; the simulator's, not a device's."""

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run once; names and shapes are the graph's, values float32, and int32 where tokens go in.

        Raises:
            UsageError: A name or a shape is not the graph's.
        """
        found = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        if found != self._inputs:
            raise UsageError(f"the context takes {self._inputs}, not {found}", hint="names and shapes are the graph's")
        typed = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
        feed = {name: tensor.detach().contiguous().cpu().numpy() for name, tensor in typed.items()}
        start = time.perf_counter()
        values = self._session.run(self._outputs, feed)
        self.seconds = time.perf_counter() - start
        return {name: torch.from_numpy(value) for name, value in zip(self._outputs, values, strict=True)}
