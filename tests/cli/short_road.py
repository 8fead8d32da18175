"""The real command line on a road of small stages, so that its tests take no model; run as a script."""

from typing import Any

from short_stage import ShortStage

from sdconvert.cli import road
from sdconvert.cli.app import main


def load_short_road(length: int = len(road.ROAD)) -> list[Any]:
    return [ShortStage(name) for name in list(road.ROAD)[:length]]


if __name__ == "__main__":
    road.load_road = load_short_road
    main()
