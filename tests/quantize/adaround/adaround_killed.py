"""AdaRound in a process that is there to be killed: python adaround_killed.py BUDGET SAMPLES FOLDER.

Says when it begins, and when it is done.
"""

import sys
from pathlib import Path

import torch
from adaround_graphs import block_graph, block_samples, int4_grids

from sdconvert.quantize.adaround.run import AdaRoundSettings, adaround


def main() -> None:
    """Run once."""
    torch.set_num_threads(1)
    budget, samples, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    traced = block_graph()
    sys.stdout.write("begin\n")
    sys.stdout.flush()
    adaround(traced, block_samples(samples), int4_grids(traced), AdaRoundSettings(budget_bytes=budget), folder)
    sys.stdout.write("done\n")


if __name__ == "__main__":
    main()
