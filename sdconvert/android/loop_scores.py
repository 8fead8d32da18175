"""What a bench makes of drawn pictures and single steps: against fp32 and simulator, with times."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdconvert.android.closed_loop import ForcedStep, Round, draw_pictures, force_steps
from sdconvert.android.executors import Executor
from sdconvert.android.loop_files import loop_of, read_pictures
from sdconvert.android.manifest import Manifest
from sdconvert.android.markdown import table
from sdconvert.android.scores import latency_figures
from sdconvert.metrics import gradient_similarity_y, psnr_db, psnr_y, sqnr_db, ssim_y

PICTURES = "pictures"
"""Folder of the pictures in a result."""
_SAMPLED = ("controlnet", "unet")


def closed_loop(
    bundle: Path, manifest: Manifest, executor: Executor, soc: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Draw the test pictures, and compare them with fp32's and the simulator's.

    Args:
        bundle: The bundle's folder.
        manifest: The bundle's.
        executor: Who answers for the graphs.
        soc: Whose contexts it runs; the simulator's pictures are compared only where they are of the same.

    Returns:
        Figures by picture; times per step and per image, in milliseconds on the device alone. And the pictures, those
        compared with too, by the names that they are to have in `pictures/`.

    Raises:
        UsageError: As `draw_pictures`.
        DeviceError: As `draw_pictures`.
    """
    drawn, rounds = draw_pictures(bundle, manifest, executor)
    record = loop_of(manifest)
    given, figures, shown = read_pictures(bundle, record), {}, dict[str, Tensor]()
    kinds = ("fp32", "simulator") if soc == record.simulated_soc else ("fp32",)
    for name, picture in drawn.items():
        shown |= {f"{name}.bench.png": picture, **{f"{name}.{kind}.png": given[name][kind] for kind in kinds}}
        scores = {f"vs_{kind}": picture_figures(given[name][kind], picture) for kind in kinds}
        figures[name] = {"png": f"{PICTURES}/{name}.bench.png", **scores}
    per_image = dict.fromkeys(drawn, 0.0)
    for one in rounds:
        for owner, time in zip(one.owners, one.times_ms, strict=True):
            per_image[owner] += time
    told = {
        "pictures": figures,
        "invocations": dict(Counter(part for one in rounds for part in manifest.parts_of(one.graph))),
        "image_ms": per_image,
        "steps": step_times(rounds),
    }
    return told, shown


def teacher_forced(bundle: Path, manifest: Manifest, executor: Executor, soc: str) -> dict[str, Any]:
    """Compare the noise predicted in every step with fp32's and the simulator's, each step by itself.

    Args:
        bundle: The bundle's folder.
        manifest: The bundle's.
        executor: Who answers for the graphs.
        soc: As `closed_loop`.

    Raises:
        UsageError: The bundle has no loop.
        DeviceError: As `draw_pictures`.
    """
    same = soc == loop_of(manifest).simulated_soc
    return {"steps": [_forced_figures(step, same) for step in force_steps(bundle, manifest, executor)]}


def picture_figures(reference: Tensor, picture: Tensor) -> dict[str, Any]:
    """Compare two pictures (3, H, W) in [0, 1]; PSNR over RGB and over luma, the similarities over luma."""
    return {
        "psnr_db": psnr_db(reference, picture, data_range=1.0),
        "psnr_y_db": psnr_y(reference, picture),
        "ssim_y": ssim_y(reference, picture),
        "gradient_similarity_y": gradient_similarity_y(reference, picture),
        "bit_equal": torch.equal(reference, picture),
    }


def step_times(rounds: Iterable[Round]) -> list[dict[str, Any]]:
    """Return for every step how long each graph in the loop took per call, and how many calls there were."""
    steps: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    done: Counter[str] = Counter()
    for one in rounds:
        if one.graph in _SAMPLED:
            steps[done[one.graph]][one.graph] = latency_figures(one.times_ms)
            done[one.graph] += 1
    return [{"step": step, **figures} for step, figures in sorted(steps.items())]


def loop_page(result: Mapping[str, Any], whose: str) -> list[str]:
    """Return the Markdown lines of what `closed_loop` and `teacher_forced` found.

    Args:
        result: With either or both under `closed_loop` and `teacher_forced`.
        whose: Follows the unit of times; says whose these are, if no device's.
    """
    lines: list[str] = []
    if loop := result.get("closed_loop"):
        columns = ("picture", "against", "PSNR dB", "PSNR-Y dB", "SSIM-Y", "gradients-Y", "bits", f"ms{whose}")
        rows = [
            (name, kind.removeprefix("vs_"), *_picture_cells(figures[kind]), f"{loop['image_ms'][name]:.1f}")
            for name, figures in loop["pictures"].items()
            for kind in ("vs_fp32", "vs_simulator")
            if kind in figures
        ]
        called = ", ".join(f"{graph} {count}" for graph, count in loop["invocations"].items())
        lines += ["", "## Pictures, drawn in a closed loop", "", f"Starts of the runner: {called}.", ""]
        lines += [*table(columns, rows), ""]
        lines += [f"![{name}]({figures['png']})" for name, figures in loop["pictures"].items()]
    if forced := result.get("teacher_forced"):
        forced_columns = ("step", "vs fp32 dB", "vs simulator dB", *(f"{graph} ms{whose}" for graph in _SAMPLED))
        forced_rows = [
            (
                str(step["step"]),
                *(f"{step[kind]['sqnr_db']:.1f}" if kind in step else "" for kind in ("vs_fp32", "vs_simulator")),
                *(f"{step['latency'][graph]['p50_ms']:.3f}" for graph in _SAMPLED),
            )
            for step in forced["steps"]
        ]
        lines += ["", "## Noise predicted from where fp32 was, each step by itself", ""]
        lines += table(forced_columns, forced_rows)
    return lines


def _forced_figures(step: ForcedStep, simulated: bool) -> dict[str, Any]:
    found = torch.stack([noise for *_, noise in step.calls])
    expected = {"vs_fp32": torch.stack([call.fp32 for _, call, _ in step.calls])}
    if simulated:
        expected["vs_simulator"] = torch.stack([call.simulator for _, call, _ in step.calls])
    return {
        "step": step.step,
        "calls": len(step.calls),
        **{
            kind: {"sqnr_db": sqnr_db(those, found), "bit_equal": torch.equal(those, found)}
            for kind, those in expected.items()
        },
        "latency": {one.graph: latency_figures(one.times_ms) for one in step.rounds},
    }


def _picture_cells(figures: Mapping[str, Any]) -> tuple[str, ...]:
    levels = (f"{figures[key]:.1f}" for key in ("psnr_db", "psnr_y_db"))
    similarities = (f"{figures[key]:.4f}" for key in ("ssim_y", "gradient_similarity_y"))
    return (*levels, *similarities, "equal" if figures["bit_equal"] else "differ")
