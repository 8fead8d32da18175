"""What the page of a bench tells below its table: the picture, temperatures, ops, and the run without a pause."""

from collections.abc import Iterator
from typing import Any

from sdconvert.android.markdown import table


def sections(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of Markdown."""
    if result["is_device"] and (image := result["image"]):
        yield ""
        yield f"One picture: {image['seconds']:.2f} s = {image['formula']}, of the medians; one tile, no guidance."
    if result["climate"]["status"] is not None or result["climate"]["celsius"]:
        yield from _climate(result)
    for graph in result["graphs"]:
        [latency] = graph["latency"].values()
        if result["is_device"] and (npu := latency.get("npu")):
            yield f"\n`{graph['name']}` on the NPU alone: p50 {npu['p50_ms']:.3f} ms, p90 {npu['p90_ms']:.3f} ms."
        if graph["counters"]:
            told = ", ".join(f"{name}: {value:g}" for name, value in graph["counters"].items())
            yield f"\n`{graph['name']}`: {told}."
    for graph in result["graphs"]:
        if profile := graph.get("op_profile"):
            yield from _ops(graph["name"], profile)
    if sustained := result.get("sustained"):
        yield "\n## Without a pause\n"
        yield (
            f"`{sustained['graph']}`, {sustained['n']} times in a row, {sustained['busy_s']:.0f} s of work: median "
            f"{sustained['first_tenth_p50_ms']:.3f} ms in the first tenth, {sustained['last_tenth_p50_ms']:.3f} ms in "
            f"the last ({sustained['slowdown']:.2f} times as long)."
        )
        for before, after in sustained["climate"]:
            yield f"\nTemperature before: {_told(before)}; after: {_told(after)}."


def _climate(result: dict[str, Any]) -> Iterator[str]:
    yield f"\nAt the start: {_told(result['climate'])}; {result['cooled_s']:.0f} s of rest before times were taken.\n"
    told = [(graph["name"], graph["climate"]) for graph in result["graphs"] if graph["climate"]]
    yield from table(
        ("graph", "before", "after"), ((name, _told(pairs[0][0]), _told(pairs[-1][1])) for name, pairs in told)
    )


def _told(climate: dict[str, Any]) -> str:
    status = [] if climate["status"] is None else [f"thermal status {climate['status']}"]
    return ", ".join([*status, *(f"{name} {value:.1f} °C" for name, value in climate["celsius"].items())]) or "not told"


def _ops(graph: str, profile: dict[str, Any]) -> Iterator[str]:
    yield f"\n## Ops of `{graph}`\n"
    yield (
        f"The {len(profile['top'])} of {profile['ops']} ops with the most cycles, from a run of its own. Cycles are "
        "summed over the units of the NPU: they compare ops, and are no time.\n"
    )
    rows = ((f"`{op['op']}`", f"{op['cycles']:.0f}", f"{op['share']:.1%}") for op in profile["top"])
    yield from table(("op", "cycles", "share"), rows)
