"""The plot of a graph's layers as SVG for a page: coloured by the page's own variables, and referring to nothing."""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Matplotlib knows no CSS variables: it draws in these colours, which then become the variables.
_COLOURS = {"muted": "#010101", "band": "#020202", "dot": "#030303", "bad": "#040404"}
_BLOCK = re.compile(r"(\w+?)_blocks?(?:\.(\d+))?")
_NARROW = 0.04  # of the width; a block below that has no room for its name


def plot_layers(graph: str, layers: Mapping[str, float], worst: set[str]) -> str:
    """Plot SQNR in dB over the execution order; blocks are shaded, the `worst` layers stand out.

    Args:
        graph: Keeps apart what the plots of one page name.
        layers: SQNR by tensor; an infinite one has no place on the axis and is left out.
        worst: Names of the tensors to mark.

    Returns:
        An `<svg>` element in the colours `var(--muted)`, `var(--band)`, `var(--dot)` and `var(--bad)`.
    """
    figure, axes = _blank()
    _shade_blocks(axes, list(layers))
    for marked, size in ((False, 9), (True, 22)):
        found = [
            (place, value)
            for place, (name, value) in enumerate(layers.items(), 1)
            if math.isfinite(value) and (name in worst) == marked
        ]
        places, levels = [place for place, _ in found], [value for _, value in found]
        axes.scatter(places, levels, s=size, linewidths=0, color=_COLOURS["bad" if marked else "dot"])
    axes.set_xlim(0.5, len(layers) + 0.5)
    axes.set_xlabel("stored tensors in execution order", color=_COLOURS["muted"])
    axes.set_ylabel("SQNR against fp32 (dB)", color=_COLOURS["muted"])
    _rule(axes, "y")
    return _to_svg(figure, graph)


def plot_blocks(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Plot SQNR in dB of every block, from the same inputs, and of all blocks up to it.

    Args:
        name: Keeps apart what the plots of one page name.
        rows: Fields of a `BlockFidelity` each, in execution order.

    Returns:
        An `<svg>` element, as `plot_layers`.
    """
    figure, axes = _blank()
    labels = [row["block"].replace("_blocks", "").replace("_block", "") for row in rows]
    for key, colour, style, label in (
        ("simulator_vs_quantized_db", "dot", "o-", "HTP to quantized model, block alone"),
        ("cumulated_simulator_vs_quantized_db", "dot", "o:", "the same, all blocks up to it"),
        ("cumulated_simulator_vs_fp32_db", "bad", "o-", "HTP to fp32, all blocks up to it"),
    ):
        levels = [row[key] if math.isfinite(row[key]) else math.nan for row in rows]
        axes.plot(range(len(rows)), levels, style, color=_COLOURS[colour], linewidth=1.2, markersize=3, label=label)
    axes.set_xticks(range(len(rows)), labels, rotation=30, ha="right", fontsize=7)
    axes.set_ylabel("SQNR (dB)", color=_COLOURS["muted"])
    _rule(axes, "y")
    axes.legend(frameon=False, labelcolor=_COLOURS["muted"], fontsize=8)
    return _to_svg(figure, name)


def plot_sizes(points: Sequence[tuple[float, float]], chosen: tuple[float, float] | None) -> str:
    """Plot predicted SQNR in dB over bits per weight.

    Args:
        points: Bits and dB of every choice of bit-widths.
        chosen: That of the recipe, to be marked.

    Returns:
        An `<svg>` element, as `plot_layers`.
    """
    figure, axes = _blank()
    axes.plot(*zip(*points, strict=True), color=_COLOURS["dot"], linewidth=1.5)
    if chosen:
        axes.scatter([chosen[0]], [chosen[1]], s=40, linewidths=0, color=_COLOURS["bad"])
    axes.set_xlabel("bits per weight", color=_COLOURS["muted"])
    axes.set_ylabel("predicted SQNR of the picture (dB)", color=_COLOURS["muted"])
    _rule(axes, "both")
    return _to_svg(figure, "sizes")


def plot_times(name: str, latency: Mapping[str, Any], invalid: bool) -> str:
    """Plot every time of a graph in the order in which they were taken; rounds are shaded in turns.

    Args:
        name: Keeps apart what the plots of one page name.
        latency: `samples_ms` and `rounds`, how many of them each round has.
        invalid: Whether the device throttled.

    Returns:
        An `<svg>` element, as `plot_layers`.
    """
    figure, axes = _blank()
    times, last = latency["samples_ms"], 0
    for index, count in enumerate(latency["rounds"]):
        if index % 2:
            axes.axvspan(last + 0.5, last + count + 0.5, color=_COLOURS["band"], linewidth=0)
        last += count
    axes.scatter(range(1, len(times) + 1), times, s=9, linewidths=0, color=_COLOURS["bad" if invalid else "dot"])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("inference", color=_COLOURS["muted"])
    axes.set_ylabel("time (ms)", color=_COLOURS["muted"])
    _rule(axes, "y")
    return _to_svg(figure, name)


def _blank() -> tuple[Figure, Axes]:
    """A wide figure without a ground of its own."""
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.subplots()
    axes.patch.set_visible(False)
    return figure, axes


def _rule(axes: Axes, along: Literal["both", "y"]) -> None:
    """Thin lines instead of a frame."""
    axes.tick_params(colors=_COLOURS["muted"])
    axes.grid(axis=along, color=_COLOURS["muted"], alpha=0.25, linewidth=0.6)
    axes.spines[:].set_visible(False)


def _shade_blocks(axes: Axes, names: list[str]) -> None:
    for index, (block, first, last) in enumerate(_blocks(names)):
        if index % 2:
            axes.axvspan(first - 0.5, last + 0.5, color=_COLOURS["band"], linewidth=0)
        if last - first + 1 >= _NARROW * len(names):
            axes.text(
                (first + last) / 2,
                1.01,
                block,
                transform=axes.get_xaxis_transform(),
                color=_COLOURS["muted"],
                fontsize=8,
                ha="center",
            )


def _blocks(names: list[str]) -> Iterator[tuple[str, int, int]]:
    """Yield each run of tensors in one block, `down_blocks.1` as `down 1`, with the places of its first and last."""
    matches = [(place, match) for place, name in enumerate(names, 1) if (match := _BLOCK.search(name))]
    for (block, index), run in groupby(matches, key=lambda item: item[1].groups(default="")):
        places = [place for place, _ in run]
        yield f"{block} {index}".rstrip(), places[0], places[-1]


def _to_svg(figure: Figure, graph: str) -> str:
    """Write the figure; without prolog, name spaces, metadata and unused names, none of which a page needs."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": graph}):
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = stream.getvalue()
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", svg)
    for variable, colour in _COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg
