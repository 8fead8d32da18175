"""What a bench makes of answers and times: figures per output, and statistics that keep the samples."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdconvert.android.climate import throttled
from sdconvert.android.manifest import GraphRecord, Manifest
from sdconvert.android.timing import Timing
from sdconvert.errors import DeviceError
from sdconvert.metrics import cosine, max_abs, psnr_db, sqnr_db

_DTYPES = {"float32": "<f4", "int32": "<i4"}


def latency_figures(samples_ms: Sequence[float]) -> dict[str, Any]:
    """Return statistics of times in milliseconds, and the times themselves in their order."""
    times = np.asarray(samples_ms, dtype=np.float64)
    mean, deviation = float(times.mean()), float(times.std())
    return {
        "n": len(times),
        "mean_ms": mean,
        "std_ms": deviation,
        "cv": deviation / mean if mean else math.nan,
        "min_ms": float(times.min()),
        **{f"p{q}_ms": float(np.percentile(times, q)) for q in (50, 90, 99)},
        "max_ms": float(times.max()),
        "samples_ms": [float(value) for value in times],
    }


def timing_figures(timing: Timing, rounds: Sequence[int], clock: str) -> dict[str, Any]:
    """Return what is told of one graph's time; what was taken while the device throttled is kept, and not averaged.

    Args:
        timing: All its rounds.
        rounds: How many of the times each round has.
        clock: What the times are.
    """
    figures = latency_figures(timing.times_ms)
    invalid = throttled(figures["p50_ms"], figures["p90_ms"], timing.climates)
    if timing.npu_ms:
        figures["npu"] = latency_figures(timing.npu_ms)
    if invalid:
        figures = {key: figures[key] for key in ("n", "samples_ms")}
    return {
        "latency": {clock: {**figures, "rounds": list(rounds)}},
        "invalid": invalid,
        "first_run_ms": timing.first_ms,
        "context_load_ms": timing.load_ms,
        "counters": timing.counters,
        "peak_kb": timing.peak_kb,
        "climate": [[one.record() for one in pair] for pair in timing.climates],
    }


def sustained_figures(timing: Timing) -> dict[str, Any]:
    """Return how a graph's time changed over a run without a pause: medians of its first and last tenth."""
    times = np.asarray(timing.times_ms, dtype=np.float64)
    tenth = max(1, len(times) // 10)
    first, last = float(np.median(times[:tenth])), float(np.median(times[-tenth:]))
    return {
        "n": len(times),
        "busy_s": float(times.sum() / 1e3),
        "first_tenth_p50_ms": first,
        "last_tenth_p50_ms": last,
        "slowdown": last / first if first else math.nan,
        "climate": [[one.record() for one in pair] for pair in timing.climates],
        "samples_ms": timing.times_ms,
    }


def accuracy_figures(
    bundle: Path, manifest: Manifest, graph: GraphRecord, answers: Mapping[str, Mapping[str, torch.Tensor]]
) -> dict[str, Any]:
    """Compare the answers of one graph with what the bundle expects, all samples of an output taken together.

    Args:
        bundle: The bundle's folder.
        manifest: The bundle's.
        graph: The graph, for the SoC that was run.
        answers: Outputs by sample id and name, shaped as the graph says.

    Raises:
        DeviceError: An answer is not finite, or different inputs got the same one.
    """
    figures: dict[str, Any] = {}
    for output in graph.outputs:
        found = {sample: tensors[output.name] for sample, tensors in answers.items()}
        fp32 = {sample: manifest.files[f"expected/{sample}/{output.name}.fp32.raw"].sha256 for sample in found}
        _check_sense(graph.name, output.name, found, fp32)
        stacked = torch.stack(list(found.values()))
        figures[output.name] = {}
        for kind, suffix in (("vs_fp32", "fp32.raw"), ("vs_simulator", f"sim.{graph.soc}.raw")):
            names = [f"expected/{sample}/{output.name}.{suffix}" for sample in found]
            if not all(name in manifest.files for name in names):
                continue
            raws = [read_raw(bundle / name, output.dtype, output.shape) for name in names]
            expected = torch.stack(raws).to(stacked.dtype)
            figures[output.name][kind] = {
                "sqnr_db": sqnr_db(expected, stacked),
                "psnr_db": psnr_db(expected, stacked, data_range=float(expected.max() - expected.min())),
                "cosine": cosine(expected, stacked),
                "max_abs": max_abs(expected, stacked),
                "bit_equal": torch.equal(expected, stacked),
            }
    return figures


def read_raw(file: Path, dtype: str, shape: Iterable[int]) -> torch.Tensor:
    """Return a tensor from a raw file of a bundle, or of a runner."""
    return torch.from_numpy(np.fromfile(file, _DTYPES[dtype]).reshape(tuple(shape)))


def _check_sense(graph: str, output: str, found: Mapping[str, torch.Tensor], fp32: Mapping[str, str]) -> None:
    for sample, tensor in found.items():
        if not tensor.isfinite().all():
            raise DeviceError(
                f"graph `{graph}` answered NaN or infinity in `{output}` for sample `{sample}`",
                hint="compare with the simulator: `sdconvert bench --runner sim`",
            )
    for one, other in combinations(found, 2):
        # A runner that reads its inputs in the wrong type answers something plausible, and always the same.
        if fp32[one] != fp32[other] and torch.equal(found[one], found[other]):
            raise DeviceError(
                f"graph `{graph}` gave the same `{output}` for samples `{one}` and `{other}`",
                hint="the runner does not read the inputs: is it of the QAIRT build that the bundle names?",
            )
