"""Benchmark a bundle: run it, compare every answer with what was expected, and write down times as they were taken."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from sdconvert.android.loop_files import loop_of
from sdconvert.android.loop_scores import closed_loop, loop_page, teacher_forced
from sdconvert.android.manifest import Manifest
from sdconvert.android.runners import Runner, graphs_of
from sdconvert.android.scores import accuracy_figures, latency_figures
from sdconvert.io.files import write_json_atomic, write_text_atomic

RESULT, PAGE = "bench.json", "bench.md"
LoopMode = Literal["closed", "teacher-forced"]
"""Whether a step begins where the one before ended, or where fp32 was."""


def bench(
    bundle: Path,
    manifest: Manifest,
    runner: Runner,
    out: Path,
    inferences: int,
    loops: Collection[LoopMode] = (),
) -> dict[str, Any]:
    """Run a bundle and write `bench.json` and `bench.md` into `out`; returns what `bench.json` holds.

    Args:
        bundle: The bundle's folder.
        manifest: What `verify_bundle` made of it.
        runner: Who runs it.
        out: Folder of the result.
        inferences: How often each graph is run for its time.
        loops: How the test pictures are sampled; not at all without any.

    Raises:
        UsageError: Loops are asked for, and the bundle has nothing to sample with.
        DeviceError: A device did not do what was asked, or its answers make no sense.
    """
    if loops:
        loop_of(manifest)
    run = runner.run(bundle, manifest, inferences)
    result: dict[str, Any] = {
        "schema_version": 1,
        "model": manifest.model,
        "qairt": manifest.qairt,
        "runner": runner.name,
        "is_device": runner.is_device,
        "soc": run.soc,
        "device": run.device,
        "notes": run.notes,
        "graphs": [
            {
                "name": graph.name,
                "latency": {name: latency_figures(times) for name, times in run.graphs[graph.name].times_ms.items()},
                "peak_kb": run.graphs[graph.name].peak_kb,
                "outputs": accuracy_figures(bundle, manifest, graph, run.graphs[graph.name].answers),
            }
            for graph in graphs_of(manifest, run.soc)
        ],
    }
    executor = runner.executor(bundle, manifest)
    if "closed" in loops:
        result["closed_loop"] = closed_loop(bundle, manifest, executor, run.soc, out)
    if "teacher-forced" in loops:
        result["teacher_forced"] = teacher_forced(bundle, manifest, executor, run.soc)
    write_json_atomic(result, out / RESULT)
    write_text_atomic(bench_page(result), out / PAGE)
    return result


def bench_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return one row per graph: name, median and 90th percentile, worst SQNR against fp32 and the simulator."""
    rows = []
    for graph in result["graphs"]:
        [latency] = graph["latency"].values()
        levels = [
            [output[kind]["sqnr_db"] for output in graph["outputs"].values() if kind in output]
            for kind in ("vs_fp32", "vs_simulator")
        ]
        worst = [f"{min(found):.1f}" if found else "" for found in levels]
        rows.append((graph["name"], f"{latency['p50_ms']:.3f}", f"{latency['p90_ms']:.3f}", *worst))
    return rows


def bench_columns(result: dict[str, Any]) -> tuple[str, ...]:
    """Return the headings of `bench_rows`; they say whose times these are."""
    whose = "" if result["is_device"] else " (no device)"
    return ("graph", f"p50 ms{whose}", f"p90 ms{whose}", "vs fp32 dB", "vs simulator dB")


def bench_page(result: dict[str, Any]) -> str:
    """Return the result as a page of Markdown."""
    columns = bench_columns(result)
    device = result["device"] or {}
    lines = [
        f"# {result['model']} on {device.get('model', 'the simulator')}",
        "",
        f"SoC {result['soc']}, QAIRT {result['qairt']}, runner {result['runner']}.",
        *(f"\n**{note}**" for note in result["notes"]),
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(row)} |" for row in bench_rows(result)),
        *loop_page(result, "" if result["is_device"] else " (no device)"),
    ]
    return "\n".join(lines) + "\n"
