"""Benchmark a bundle: run it, compare every answer with what was expected, and write down times as they were taken."""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sdconvert.android.artifact import RESULT, RESULT_VERSION
from sdconvert.android.bench_sections import sections
from sdconvert.android.climate import SCATTER
from sdconvert.android.image_time import image_time
from sdconvert.android.loop_files import loop_of
from sdconvert.android.loop_scores import PICTURES, closed_loop, loop_page, teacher_forced
from sdconvert.android.manifest import GraphRecord, Manifest
from sdconvert.android.markdown import table
from sdconvert.android.measure import Job, Measured, measure
from sdconvert.android.plausibility import doubt
from sdconvert.android.scores import accuracy_figures, sustained_figures, timing_figures
from sdconvert.android.timing import LoopMode, Plan
from sdconvert.errors import DeviceError
from sdconvert.io.files import atomic_folder, sha256_file, write_json_atomic, write_text_atomic
from sdconvert.io.images import write_png

PAGE = "bench.md"


def bench(jobs: Sequence[Job], outs: Sequence[Path], plan: Plan) -> list[dict[str, Any]]:
    """Run bundles in one session and write `bench.json` and `bench.md` of each; returns what the files hold.

    Args:
        jobs: Bundles and who runs them, all on the same device.
        outs: Folder of the result of each.
        plan: What is measured, and how often.

    Raises:
        UsageError: Pictures are asked for of a bundle that has nothing to sample with.
        DeviceError: A device did not do what was asked, or its answers make no sense.
    """
    for job in jobs if plan.loops else ():
        loop_of(job.manifest)
    session = secrets.token_hex(8)
    results = [_result(job, found, session) for job, found in zip(jobs, measure(jobs, plan), strict=True)]
    sampled = [_sampled(job, plan) for job in jobs]
    # Not before everything is there: a result that is interrupted would stand beside pictures of another one.
    whole = [result | figures for result, (figures, _) in zip(results, sampled, strict=True)]
    for result, (_, pictures), out in zip(whole, sampled, outs, strict=True):
        _write(result, pictures, out)
    return whole


def _write(result: dict[str, Any], pictures: Mapping[str, Tensor], out: Path) -> None:
    if pictures:
        with atomic_folder(out / PICTURES) as folder:
            for name, picture in pictures.items():
                write_png(picture, folder / name)
    write_json_atomic(result, out / RESULT)
    write_text_atomic(bench_page(result), out / PAGE)


def _result(job: Job, found: Measured, session: str) -> dict[str, Any]:
    manifest, runner = job.manifest, job.runner
    graphs = [_graph_result(job, graph, found) for graph in job.graphs]
    valid = {graph["name"]: graph["latency"][runner.clock]["p50_ms"] for graph in graphs if not graph["invalid"]}
    result: dict[str, Any] = {
        "schema_version": RESULT_VERSION,
        "session": session,
        "bundle": sha256_file(job.bundle / "manifest.json"),
        "model": manifest.model,
        "qairt": manifest.qairt,
        "runner": runner.name,
        "is_device": runner.is_device,
        "soc": runner.soc,
        "device": runner.about()[0],
        "climate": found.climate.record(),
        "cooled_s": found.cooled_s,
        "test_inputs": _test_inputs(manifest),
        "notes": [*found.notes, *_scatter_notes(graphs), *(_doubts(job, valid) if runner.is_device else [])],
        "graphs": graphs,
        "image": image_time(manifest, valid) if runner.is_device else None,
    }
    if found.sustained:
        name, timing = found.sustained
        result["sustained"] = {"graph": name, **sustained_figures(timing)}
    return result


def _sampled(job: Job, plan: Plan) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Sample the test pictures, last of all, for it warms the device; figures, and the pictures by file name."""
    where_it_can: tuple[LoopMode, ...] = ("closed", "teacher-forced") if job.manifest.loop else ()
    loops = where_it_can if plan.loops is None else plan.loops
    executor, found = job.runner.executor(job.bundle, job.manifest), dict[str, Any]()
    pictures: dict[str, Tensor] = {}
    if "closed" in loops:
        found["closed_loop"], pictures = closed_loop(job.bundle, job.manifest, executor, job.runner.soc)
    if "teacher-forced" in loops:
        found["teacher_forced"] = teacher_forced(job.bundle, job.manifest, executor, job.runner.soc)
    return found, pictures


def _doubts(job: Job, median_ms: Mapping[str, float]) -> list[str]:
    sizes = {graph.name: job.manifest.files[graph.context].bytes for graph in job.graphs}
    told = (
        doubt(graph, sizes[graph.name], graph.soc, median_ms[graph.name])
        for graph in job.graphs
        if graph.name in median_ms
    )
    return [text for text in told if text]


def _scatter_notes(graphs: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    for graph in graphs:
        [latency] = graph["latency"].values()
        if not graph["invalid"] and latency["p90_ms"] > SCATTER * latency["p50_ms"]:
            ratio = latency["p90_ms"] / latency["p50_ms"]
            found.append(f"times of `{graph['name']}` scatter (p90/p50 = {ratio:.2f}): is something else running?")
    return found


def _graph_result(job: Job, graph: GraphRecord, found: Measured) -> dict[str, Any]:
    timing = found.timing(graph.name)
    result = {
        "name": graph.name,
        "inputs": {tensor.name: list(tensor.shape) for tensor in graph.inputs},
        "context_bytes": job.manifest.files[graph.context].bytes,
        **timing_figures(timing, [len(one.times_ms) for one in found.rounds[graph.name]], job.runner.clock),
        "outputs": accuracy_figures(job.bundle, job.manifest, graph, found.answers[graph.name]),
    }
    if found.ops:
        result["op_profile"] = found.ops[graph.name]
    return result


def _test_inputs(manifest: Manifest) -> str:
    """One checksum over everything that goes into the graphs: results of other inputs cannot be compared."""
    digest = hashlib.sha256()
    for name, record in sorted(manifest.files.items()):
        if record.role == "input":
            digest.update(f"{name} {record.sha256}\n".encode())
    return digest.hexdigest()


def require_valid(results: Sequence[dict[str, Any]]) -> None:
    """Refuse results whose times say nothing.

    Raises:
        DeviceError: A device throttled while a graph was timed.
    """
    for result in results:
        invalid = [f"{graph['name']} ({graph['invalid']})" for graph in result["graphs"] if graph["invalid"]]
        if invalid:
            raise DeviceError(
                f"device `{(result['device'] or {}).get('serial', result['runner'])}` throttled while it was timed: "
                f"{', '.join(invalid)}; these times are kept as they came, and count for nothing",
                hint="take the phone off its charger and out of its case, let it cool, and run the same command again",
            )


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
        times = ["invalid"] * 2 if graph["invalid"] else [f"{latency[key]:.3f}" for key in ("p50_ms", "p90_ms")]
        once = [f"{graph[key]:.1f}" if graph[key] is not None else "" for key in ("first_run_ms", "context_load_ms")]
        rows.append((graph["name"], *times, *once, *worst))
    return rows


def bench_columns(result: dict[str, Any]) -> tuple[str, ...]:
    """Return the headings of `bench_rows`; they say whose times these are."""
    whose = "" if result["is_device"] else " (no device)"
    times = (f"{name} ms{whose}" for name in ("p50", "p90", "first run", "load"))
    return ("graph", *times, "vs fp32 dB", "vs simulator dB")


def bench_page(result: dict[str, Any]) -> str:
    """Return the result as a page of Markdown."""
    device = result["device"] or {}
    lines = [
        f"# {result['model']} on {device.get('model', 'the simulator')}",
        "",
        f"SoC {result['soc']}, QAIRT {result['qairt']}, runner {result['runner']}.",
        *(f"\n**{note}**" for note in result["notes"]),
        "",
        *table(bench_columns(result), bench_rows(result)),
        *sections(result),
        *loop_page(result, "" if result["is_device"] else " (no device)"),
    ]
    return "\n".join(lines) + "\n"
