"""How near the HTP is to the simulation and to fp32, op by op and generation by generation, in Qualcomm's simulator.

python benchmarks/ops_on_htp.py [--soc SM8350 SM8450 …]
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from sdconvert.quantize.settings import load_settings
from sdconvert.soc import find_soc

# The cases are those of tests/qnn/test_ops_on_htp.py.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from htp_ops import SOCS, Agreement, OpsOnHtp, cases


def measure(socs: Sequence[str], folder: Path) -> dict[str, Mapping[str, Agreement]]:
    """Figures by SoC and case; SoCs of one group of settings share an ONNX file."""
    every, exported, found = cases(whole=True), {}, {}
    for soc in socs:
        arch = find_soc(soc).arch
        group = load_settings({arch}).name
        if group not in exported:
            exported[group] = OpsOnHtp(every, arch, folder / group)
        found[soc] = exported[group].measure(soc)
    return found


def worst(figures: Mapping[str, Agreement], op: str) -> str:
    """The lowest figures of an op over its cases, as a cell of the table."""
    of_op = [one for one in figures.values() if one.op == op]
    agreement = min(one.simulator_vs_simulation for one in of_op)
    return f"{agreement:.1f}, {min(one.simulator_vs_fp32 for one in of_op):.1f}"


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description="Measure single ops in the HTP simulator.")
    parser.add_argument("--soc", nargs="+", default=[*SOCS.values(), "QCS6490"], metavar="SOC")
    socs = parser.parse_args().soc
    torch.set_num_threads(1)
    print(f"onnxruntime-qnn {version('onnxruntime-qnn')}, aimet-torch {version('aimet-torch')}, ", end="")
    print(f"torch {version('torch')}; simulator vs simulation, simulator vs fp32, dB, worst of all ranges\n")
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(socs, Path(folder))
    print(f"| op | {' | '.join(f'{soc} (v{find_soc(soc).arch})' for soc in socs)} |")
    print(f"|---{'|---' * len(socs)}|")
    for op in dict.fromkeys(case.op for case in cases(whole=True).values()):
        print(f"| {op} | {' | '.join(worst(figures[soc], op) for soc in socs)} |")


if __name__ == "__main__":
    main()
