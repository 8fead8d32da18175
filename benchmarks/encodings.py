"""Encodings of PASD's UNet at full size: read, cut per head, write, read again and compare.

python benchmarks/encodings.py [--rounds 3]

Weights have one scale per output channel, norms one in all. Each run is a process of its own, so that peak memory is
its own; `json` is what reading and writing the same file with Python's parser takes, without looking at it.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from sdconvert.io.encodings import parse_encodings, read_encodings_file
from sdconvert.io.encodings.convert import convert
from sdconvert.mha2sha.encodings import split_encodings, verify_parameter_encodings
from sdconvert.mha2sha.heads import attention_paths, head_splits

HEADS = 8
FORMS = ("1.0.0", "0.6.1", "2.0.0")


# Torch stays out of the process that starts the others: a child counts its parent's peak memory as its own.
SHAPES = """
import json, sys
from scripts.make_fullsize import fullsize_shapes
json.dump(fullsize_shapes("unet"), sys.stdout)
"""


def write_encodings(path: Path, shapes: Mapping[str, Sequence[int]], version: str) -> int:
    """Write encodings of all weights, indented as AIMET does, and return the number of scales."""
    numbers = random.Random(0)
    params: list[dict[str, Any]] = []
    for key, shape in shapes.items():
        if not key.endswith("weight"):
            continue
        kind, count = ("PER_CHANNEL", shape[0]) if len(shape) > 1 else ("PER_TENSOR", 1)
        scale = [numbers.uniform(1e-4, 1e-2) for _ in range(count)]
        head = {"name": key, "enc_type": kind, "dtype": "INT", "bw": 8, "is_sym": True}
        params.append({**head, "scale": scale, "offset": [-128] * count})
    file = parse_encodings(json.dumps({"version": "1.0.0", "activation_encodings": [], "param_encodings": params}))
    if version != file.version:
        file = convert(file, version, shapes).file
    path.write_text(json.dumps(json.loads(file.dumps()), indent=4))
    return sum(len(entry["scale"]) for entry in params)


def run_split(folder: Path, version: str) -> dict[str, float]:
    """Seconds of each step on the file of a version."""
    shapes = {key: tuple(shape) for key, shape in json.loads((folder / "shapes.json").read_text()).items()}
    splits = head_splits(shapes, dict.fromkeys(attention_paths(shapes), HEADS))
    marks = [time.perf_counter()]
    mha = read_encodings_file(folder / f"{version}.encodings")
    marks.append(time.perf_counter())
    result = split_encodings(mha, splits, list(shapes))
    marks.append(time.perf_counter())
    result.file.write(folder / "sha.encodings")
    marks.append(time.perf_counter())
    verify_parameter_encodings(mha, read_encodings_file(folder / "sha.encodings"), splits)
    marks.append(time.perf_counter())
    steps = [second - first for first, second in pairwise(marks)]
    return dict(zip(("read", "split", "write", "verify"), steps, strict=True))


def run_json(folder: Path, version: str) -> dict[str, float]:
    """Seconds of Python's parser on the same file."""
    start = time.perf_counter()
    content = json.loads((folder / f"{version}.encodings").read_text())
    middle = time.perf_counter()
    (folder / "json.encodings").write_text(json.dumps(content))
    return {"read": middle - start, "write": time.perf_counter() - middle}


def run_write(folder: Path, version: str) -> dict[str, float]:
    """Write the file to measure on."""
    shapes = json.loads((folder / "shapes.json").read_text())
    return {"scales": write_encodings(folder / f"{version}.encodings", shapes, version)}


RUNS = {"write": run_write, "sdconvert": run_split, "json": run_json}


def measure(folder: Path, version: str, what: str) -> tuple[dict[str, float], float]:
    """Steps in seconds and peak RSS in MB of one process."""
    with subprocess.Popen(
        [sys.executable, __file__, "--one", str(folder), version, what], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return json.loads(text), usage.ru_maxrss / 1e3


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        folder, version, what = arguments.one
        print(json.dumps(RUNS[what](Path(folder), version)))
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("version  file MB  scales   what       read s  split s  write s  in all s  verify s  peak RSS MB")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        root = Path(__file__).parents[1]
        shapes = subprocess.run([sys.executable, "-c", SHAPES], cwd=root, capture_output=True, check=True).stdout
        (folder / "shapes.json").write_bytes(shapes)
        for version in FORMS:
            path = folder / f"{version}.encodings"
            scales = int(measure(folder, version, "write")[0]["scales"])
            runs: dict[str, list[tuple[dict[str, float], float]]] = {"sdconvert": [], "json": []}
            for _ in range(arguments.rounds):
                for what, found in runs.items():
                    found.append(measure(folder, version, what))
            for what, found in runs.items():
                step = {name: statistics.median(run[0].get(name, 0.0) for run in found) for name in found[0][0]}
                cells = [step.get(name, 0.0) for name in ("read", "split", "write")]
                size, peak = path.stat().st_size / 1e6, statistics.median(run[1] for run in found)
                print(
                    f"{version:7s} {size:8.1f} {scales:7d}   {what:9s} "
                    + "".join(f"{cell:8.2f} " for cell in (*cells, sum(cells), step.get("verify", 0.0)))
                    + f"{peak:12.0f}"
                )


if __name__ == "__main__":
    main()
