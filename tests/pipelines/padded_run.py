"""A program: sample with models that are padded to a size each, and report the peak of memory as JSON.

Usage: padded_run.py FOLDER MEMORY_LIMIT
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdconvert.memory import PeakMemory, return_freed_memory
from sdconvert.pipelines.pasd import PASDPipeline
from sdconvert.pipelines.residency import ModelResidency

PADDING, LAYERS = 48 << 20, 8
PARTS = ("unet", "controlnet", "vae", "text_encoder")


def pad(pipe: PASDPipeline) -> None:
    """Give every model weights that its every call reads, as wide layers would be."""
    for name in PARTS:
        model = getattr(pipe, name)
        first = next(part for part in model.modules() if any(True for _ in part.parameters(recurse=False)))
        for index in range(LAYERS):
            ballast = nn.Parameter(torch.ones(PADDING // LAYERS // 4), requires_grad=False)
            first.register_parameter(f"ballast{index}", ballast)
        first.register_forward_hook(_read_ballast)


def _read_ballast(module: nn.Module, args: Any, output: Any) -> None:
    for index in range(LAYERS):
        ballast = getattr(module, f"ballast{index}")
        assert ballast[::1024].sum() == ballast.numel() // 1024


def main(folder: Path, memory_limit: int) -> dict[str, int]:
    """Sample within the limit, load every model 50 times more, and sample with all models in memory."""
    pipe = PASDPipeline.from_pretrained(folder)
    request: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2}
    image = torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(0))
    pipe(image, **request)  # before anything is measured, for kernels are set up in their first call
    baseline = _resident()
    pad(pipe)
    residency = ModelResidency(folder=folder / "offload", memory_limit=memory_limit)
    pipe.manage_models(residency)
    residency.load([])
    return_freed_memory()
    peak = PeakMemory()
    pipe(image, **request)
    limited = peak.peak_bytes() - baseline
    after = []
    for _ in range(50):
        for name in PARTS:
            residency.load([name])
        after.append(_resident())
    residency.restore()
    pipe.residency = None
    pipe(image, **request)
    return {"limited": limited, "creep": after[-1] - after[4], "free": _resident() - baseline}


def _resident() -> int:
    return PeakMemory().peak_bytes()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
