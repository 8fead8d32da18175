"""Two results of `bench` side by side: how their times relate, with an interval, and how their answers differ.

The ratio is that of medians. Its interval is the bootstrap's over whole blocks of neighbouring times, for neighbours
resemble each other: rounds, where there were several, else stretches of about sqrt(n). Results of one session were
taken in turns, so rounds of the same number are drawn together, and what warmed both cancels. Between sessions it does
not: the interval then knows only how times scatter within each, and says so.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdconvert.android.markdown import table
from sdconvert.android.measure import Job
from sdconvert.errors import UsageError
from sdconvert.io.files import write_json_atomic, write_text_atomic

_DRAWS, _SEED = 2000, 0
_LEVEL = 95
_KINDS = ("vs_fp32", "vs_simulator")
_Times = NDArray[np.float64]
_Shapes = tuple[dict[str, list[int]], list[str]]
"""Shapes of a graph's inputs, and names of its outputs."""


def compare(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return what two results say about each other, as JSON-able data.

    Raises:
        UsageError: They cannot be compared; the message says why.
    """
    _check_comparable(first, second)
    one_session = first["session"] == second["session"]
    notes = []
    if not first["is_device"]:
        notes.append("no device took these times: only the answers are compared")
    elif not one_session:
        notes.append(
            "taken in two sessions: the intervals know nothing of a phone that was warmer or busier in one of them; "
            "bench both together: `sdconvert bench A B`"
        )
    models = [(result["device"] or {}).get("model", "") for result in (first, second)]
    if models[0] != models[1]:
        notes.append(f"taken on two phones, {models[0]} and {models[1]}: one may cool better, or be set otherwise")
    if first["test_inputs"] != second["test_inputs"]:
        notes.append("the bundles have other test inputs: their answers are not compared")
    graphs, others = [], {graph["name"]: graph for graph in second["graphs"]}
    for one in first["graphs"]:
        other = others[one["name"]]
        graphs.append(
            {
                "name": one["name"],
                "latency": _latency(one, other, paired=one_session) if first["is_device"] else None,
                "invalid": one["invalid"] or other["invalid"],
                "outputs": _accuracy(one, other) if first["test_inputs"] == second["test_inputs"] else {},
            }
        )
    return {
        "schema_version": 1,
        "models": [first["model"], second["model"]],
        "soc": first["soc"],
        "one_session": one_session,
        "notes": notes,
        "graphs": graphs,
    }


def ratio_of_medians(first: Sequence[_Times], second: Sequence[_Times], *, paired: bool) -> tuple[float, float, float]:
    """Return median of the second over median of the first, and the ends of its 95 % interval.

    Args:
        first: Blocks of neighbouring times.
        second: The same of the other result.
        paired: Whether blocks of the same number were taken one after the other, and are drawn together.
    """
    generator = np.random.default_rng(_SEED)
    left = generator.integers(len(first), size=(_DRAWS, len(first)))
    right = left if paired else generator.integers(len(second), size=(_DRAWS, len(second)))
    drawn = _drawn_medians(second, right) / _drawn_medians(first, left)
    tail = (100 - _LEVEL) / 2
    low, high = np.percentile(drawn, (tail, 100 - tail))
    return _median(second) / _median(first), float(low), float(high)


def blocks(latency: dict[str, Any]) -> list[_Times]:
    """Return the times of a result in the blocks that are drawn: rounds, or stretches of about sqrt(n)."""
    times = np.asarray(latency["samples_ms"], dtype=np.float64)
    rounds = latency["rounds"]
    if len(rounds) > 1:
        return np.split(times, np.cumsum(rounds)[:-1])
    return np.array_split(times, max(1, round(len(times) ** 0.5)))


def _latency(one: dict[str, Any], other: dict[str, Any], *, paired: bool) -> dict[str, float] | None:
    if one["invalid"] or other["invalid"]:
        return None
    [first], [second] = one["latency"].values(), other["latency"].values()
    left, right = blocks(first), blocks(second)
    in_turns = paired and len(first["rounds"]) == len(second["rounds"]) > 1
    ratio, low, high = ratio_of_medians(left, right, paired=in_turns)
    return {
        "first_p50_ms": first["p50_ms"],
        "second_p50_ms": second["p50_ms"],
        "ratio": ratio,
        "low": low,
        "high": high,
    }


def _accuracy(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """SQNR of both, and what the second has more of, by output and what it was compared with."""
    found: dict[str, Any] = {}
    for output, kinds in one["outputs"].items():
        for kind in _KINDS:
            if kind in kinds and kind in other["outputs"][output]:
                first, second = kinds[kind]["sqnr_db"], other["outputs"][output][kind]["sqnr_db"]
                # Two infinite levels are equal; their difference is no number.
                more = 0.0 if first == second else second - first
                found.setdefault(output, {})[kind] = {"first_db": first, "second_db": second, "more_db": more}
    return found


def _check_comparable(first: dict[str, Any], second: dict[str, Any]) -> None:
    if first["is_device"] != second["is_device"]:
        raise UsageError(
            "one result is of a device and one of the simulator, whose times are this computer's",
            hint="compare two of a device, or two of the simulator",
        )
    if first["soc"] != second["soc"]:
        raise UsageError(
            f"one result is of {first['soc']}, the other of {second['soc']}", hint="compare results of one SoC"
        )
    if first["runner"] != second["runner"]:
        raise UsageError(
            f"one result is of {first['runner']}, the other of {second['runner']}, which time different things",
            hint="use one --runner for both",
        )
    shapes = [
        {graph["name"]: (graph["inputs"], sorted(graph["outputs"])) for graph in result["graphs"]}
        for result in (first, second)
    ]
    _check_same_model((first["model"], second["model"]), shapes)


def check_bundles(jobs: Sequence[Job]) -> None:
    """Refuse bundles whose results could not be compared, before they are run.

    Raises:
        UsageError: They are not builds of one model for one SoC.
    """
    first, second = jobs
    if first.runner.soc != second.runner.soc:
        raise UsageError(
            f"one bundle is run for {first.runner.soc}, the other for {second.runner.soc}", hint="compile both for one"
        )
    shapes = [
        {
            graph.name: (
                {tensor.name: list(tensor.shape) for tensor in graph.inputs},
                sorted(tensor.name for tensor in graph.outputs),
            )
            for graph in job.graphs
        }
        for job in jobs
    ]
    _check_same_model((first.manifest.model, second.manifest.model), shapes)


def _check_same_model(models: tuple[str, str], shapes: Sequence[dict[str, _Shapes]]) -> None:
    first, second = shapes
    if differ := sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name)):
        raise UsageError(
            f"`{models[0]}` and `{models[1]}` are not builds of one model: graph `{differ[0]}` is in one of them only, "
            "or has other inputs or outputs",
            hint="compare two bundles with the same graphs, names and shapes",
        )


def _drawn_medians(parts: Sequence[_Times], drawn: NDArray[np.int64]) -> _Times:
    # Blocks differ by one time at most; without it they are one array.
    size = min(map(len, parts))
    table = np.stack([part[:size] for part in parts])
    medians: _Times = np.median(table[drawn].reshape(len(drawn), -1), axis=1)
    return medians


def _median(parts: Sequence[_Times]) -> float:
    return float(np.median(np.concatenate(parts)))


def write_comparison(comparison: dict[str, Any], out: Path) -> None:
    """Write `compare.json` and `compare.md` into a folder."""
    write_json_atomic(comparison, out / "compare.json")
    write_text_atomic(compare_page(comparison), out / "compare.md")


def compare_rows(comparison: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return one row per graph: medians, ratio with its interval, and the smallest gain in dB of any output."""
    rows = []
    for graph in comparison["graphs"]:
        latency = graph["latency"]
        if latency:
            times = [f"{latency[key]:.3f}" for key in ("first_p50_ms", "second_p50_ms", "ratio")]
            times.append(f"{latency['low']:.3f} to {latency['high']:.3f}")
        else:
            times = ["invalid" if graph["invalid"] else ""] * 4
        more = [[output[kind]["more_db"] for output in graph["outputs"].values() if kind in output] for kind in _KINDS]
        rows.append((graph["name"], *times, *(f"{min(found):+.1f}" if found else "" for found in more)))
    return rows


def compare_columns() -> tuple[str, ...]:
    """Return the headings of `compare_rows`."""
    return ("graph", "A p50 ms", "B p50 ms", "B/A", f"{_LEVEL} %", "B-A vs fp32 dB", "B-A vs simulator dB")


def compare_page(comparison: dict[str, Any]) -> str:
    """Return the comparison as a page of Markdown."""
    lines = [
        f"# A: {comparison['models'][0]}, B: {comparison['models'][1]}, on {comparison['soc']}",
        *(f"\n**{note}**" for note in comparison["notes"]),
        "",
        *table(compare_columns(), compare_rows(comparison)),
        "",
        f"B/A is the ratio of the medians, below 1 where B is faster, with its {_LEVEL} % interval; dB are those of "
        "the output that lost most.",
    ]
    return "\n".join(lines) + "\n"
