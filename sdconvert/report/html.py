"""The page: the template filled in; every number in it also carries its exact value, as in `report.json`."""

import math
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.filters import do_filesizeformat
from markupsafe import Markup

from sdconvert.io.files import to_json
from sdconvert.report.figures import worst_layers
from sdconvert.report.pictures import LABELS
from sdconvert.report.plot import plot_blocks, plot_layers, plot_sizes, plot_times

_WORST = 10
_FORMATS = {"dB": "{:.1f} dB", "s": "{:,.1f} s", "ms": "{:,.2f} ms", "ssim": "{:.3f}", "ratio": "{:.3f}"}


def render_html(figures: Mapping[str, Any], pictures: Mapping[str, Mapping[str, Path]]) -> str:
    """Return the page as one self-contained HTML document.

    Args:
        figures: What `collect_figures` gives.
        pictures: PNG files by crop and kind; they are copied into the page.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"as": show_number, "png": _data_url}
    worst = {graph: worst_layers(layers, _WORST) for graph, layers in figures["layers"].items()}
    plots = {
        graph: Markup(plot_layers(graph, layers, {name for _, name, _ in worst[graph]}))
        for graph, layers in figures["layers"].items()
    }
    block_plots = {
        (graph, soc): Markup(plot_blocks(f"blocks-{graph}-{soc}", rows))
        for graph, by_soc in figures["fidelity"].items()
        for soc, rows in by_soc.items()
    }
    sizes = figures["size_quality"]
    size_plot = Markup(plot_sizes(sizes["points"], sizes["chosen"])) if sizes else None
    time_plots = {
        graph["name"]: Markup(plot_times(f"times-{graph['name']}", latency, bool(graph["invalid"])))
        for graph in figures["bench"].get("graphs", ())
        for latency in graph.get("latency", {}).values()
    }
    template = environment.get_template("report.html.j2")
    return template.render(
        figures,
        images=pictures,
        labels=LABELS,
        worst=worst,
        plots=plots,
        block_plots=block_plots,
        size_plot=size_plot,
        time_plots=time_plots,
    )


def show_number(value: float | None, unit: str = "") -> Markup:
    """Return a number for a reader, its exact value beside it; a dash where there is none.

    Args:
        value: Infinite for the SQNR of equal tensors.
        unit: `dB`, `s`, `ms`, `bytes`, `ssim` and `ratio` (three digits), or nothing.
    """
    if value is None:
        return Markup("–")
    return Markup('<data value="{}">{}</data>').format(to_json(value).strip('"'), _text(value, unit))


def _text(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return {"inf": "∞", "-inf": "-∞"}.get(str(value), "NaN")
    if unit == "bytes":
        return do_filesizeformat(value, binary=True)
    return _FORMATS.get(unit, "{:,}" if isinstance(value, int) else "{:.6g}").format(value)


def _data_url(path: Path) -> str:
    return f"data:image/png;base64,{b64encode(path.read_bytes()).decode()}"
