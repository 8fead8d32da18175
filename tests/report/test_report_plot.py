"""The plot draws every finite layer once, marks the worst, and names its blocks."""

import math
import re

import pytest

from sdconvert.report.figures import worst_layers
from sdconvert.report.plot import plot_layers

LAYERS = {
    ":sample": math.inf,
    **{f"down_blocks.{place // 10}.conv:conv2d.{place}": 60.0 - place for place in range(20)},
    **{f"decoder.mid_block.add:add.{place}": 50.0 + place for place in range(10)},
}


def points(svg: str, colour: str) -> int:
    return sum("<use" in line and f"var(--{colour})" in line for line in svg.splitlines())


def test_every_finite_layer_is_one_point() -> None:
    worst = {name for _, name, _ in worst_layers(LAYERS, 3)}
    svg = plot_layers("unet", LAYERS, worst)
    assert (points(svg, "bad"), points(svg, "dot")) == (3, len(LAYERS) - 1 - 3)


@pytest.mark.parametrize("block", ["down 0", "down 1", "mid"])
def test_blocks_are_named(block: str) -> None:
    assert f">{block}</text>" in plot_layers("unet", LAYERS, set())


def test_a_graph_without_loss_has_an_empty_plot() -> None:
    svg = plot_layers("unet", {":sample": math.inf}, set())
    assert points(svg, "dot") == 0
    assert svg.startswith("<svg")


def test_two_plots_of_one_page_share_no_name() -> None:
    first, second = (set(re.findall(r' id="([^"]+)"', plot_layers(graph, LAYERS, set()))) for graph in ("unet", "vae"))
    assert first
    assert first.isdisjoint(second)


def test_worst_layers_come_first_with_their_place() -> None:
    assert worst_layers({"a": 30.0, "b": math.inf, "c": 20.0, "d": 25.0}, 2) == [(3, "c", 20.0), (4, "d", 25.0)]
