"""Time and peak memory of the whole road on `pasd_tiny`, and of a second run that has nothing to do.

python benchmarks/convert.py [--recipe pasd_tiny]
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from sdconvert.artifacts import Manifest


def main() -> None:
    """Run the road twice and print what it took."""
    parser = argparse.ArgumentParser(description="Measure `sdconvert convert`.")
    parser.add_argument("--recipe", default="pasd_tiny")
    recipe = parser.parse_args().recipe
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "aimet-torch", "onnxruntime-qnn"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}")
    with tempfile.TemporaryDirectory() as build:
        command = [sys.executable, "-m", "sdconvert", "--progress", "none", "convert", recipe, "--build", build]
        seconds = []
        for _ in range(2):
            start = time.monotonic()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.monotonic() - start)
        print(f"{'stage':16} {'seconds':>8} {'peak RSS, MiB':>14}")
        manifests = [Manifest.load(folder) for folder in sorted(Path(build).glob("*/[0-9]*-*"))]
        for manifest in manifests:
            if manifest is not None:
                print(f"{manifest.stage:16} {manifest.seconds:8.1f} {manifest.peak_rss_bytes / 2**20:14.0f}")
        print(f"first run {seconds[0]:.1f} s, second run {seconds[1]:.1f} s")


if __name__ == "__main__":
    main()
