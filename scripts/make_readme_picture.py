"""Make the README's picture from a finished run: one tile of every held-out photograph, from input to simulator."""

import argparse
from pathlib import Path

from sdconvert.artifacts import RunFolder
from sdconvert.io.images import write_png
from sdconvert.report.pictures import TILE, collect_pictures, compose_strip


def main(arguments: list[str] | None = None) -> None:
    """Write the picture.

    Raises:
        PreconditionError: The run has not got as far as the simulator.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_folder", type=Path, help="such as build/pasd_tiny")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images/pasd_tiny.png"), help="a PNG file")
    parser.add_argument("--scale", type=int, default=2, help="pixels of the result per pixel of a tile, along a side")
    options = parser.parse_args(arguments)
    pictures = collect_pictures(RunFolder(options.run_folder))
    tiles = [kinds for name, kinds in pictures.items() if name.endswith(TILE)]
    write_png(compose_strip(tiles, scale=options.scale), options.output)


if __name__ == "__main__":
    main()
