"""Run an exported graph in ONNX Runtime on the CPU, exactly as written."""

from pathlib import Path

import onnxruntime
import torch

from sdconvert.adapters import Tensors


class OnnxRunner:
    """One session.

    ONNX Runtime's own graph optimizations change the numerics of 16-bit Q/DQ (72 → 38 dB against the simulation), so
    all of them are off.

    Args:
        path: Of the ONNX file.
    """

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, inputs: Tensors) -> Tensors:
        """Run the graph on named inputs."""
        feed = {name: tensor.numpy() for name, tensor in inputs.items()}
        results = self._session.run(self._outputs, feed)
        return {name: torch.from_numpy(result) for name, result in zip(self._outputs, results, strict=True)}
