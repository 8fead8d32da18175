"""How long a push of a bundle takes to a phone of the test rig: everything, nothing new, and one file that differs.

python benchmarks/push.py [build/pasd_tiny/70-android/bundle]
"""

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from sdconvert.android.adb import Adb
from sdconvert.android.manifest import Manifest
from sdconvert.android.push import LocalFile, PushReport, device_files, push

# The phone and its daemon are those of tests/android.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests/android"))

from adb_rig import Rig, adb_environment, adb_version, bundled_adb, other_adb

REMOTE, ROUNDS = "/data/local/tmp/sdconvert", 9


def timed(adb: Adb, files: dict[str, LocalFile]) -> tuple[float, PushReport]:
    """Seconds of one push, and what it did."""
    begin = time.perf_counter()
    told = push(adb, files, REMOTE)
    return time.perf_counter() - begin, told


def measure(binary: Path, files: dict[str, LocalFile], folder: Path) -> None:
    """Print one row of the table."""
    environment = adb_environment(folder)
    os.environ.update(environment)
    rig = Rig(binary, environment, folder)
    try:
        phone = rig.phone()
        adb = Adb(binary, phone.daemon.serial)
        first, whole = timed(adb, files)
        before = phone.pushed_bytes
        unchanged = [timed(adb, files) for _ in range(ROUNDS)]
        if any(told.sent_files for _, told in unchanged) or phone.pushed_bytes != before:
            sys.exit("an unchanged bundle was sent again")
        damaged = phone.path(f"{REMOTE}/bundle") / max(files, key=lambda name: files[name].nbytes)
        damaged.write_bytes(bytes(8))
        repaired, told = timed(adb, files)
        seconds = statistics.median(second for second, _ in unchanged)
        worst = max(second for second, _ in unchanged)
        print(
            f"{adb_version(binary):16} {whole.sent_bytes / 1e6:8.1f} {first:8.2f} {seconds:12.2f} {worst:10.2f}"
            f" {told.sent_bytes / 1e6:9.1f} {repaired:8.2f}"
        )
    finally:
        rig.close()
        rig.kill_server()


def main() -> None:
    """Print a table, one row per client."""
    parser = argparse.ArgumentParser(description="Measure the push of a bundle.")
    parser.add_argument("bundle", type=Path, nargs="?", default=Path("build/pasd_tiny/70-android/bundle"))
    bundle = parser.parse_args().bundle
    manifest = Manifest.model_validate_json((bundle / "manifest.json").read_bytes())
    files = device_files(bundle, manifest, manifest.socs[0].name)
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    tools = "toybox" if shutil.which("toybox") else "this computer's tools"
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {load}; {len(files)} files, {tools} on the phone")
    print(f"{'adb':16} {'MB':>8} {'all s':>8} {'unchanged s':>12} {'slowest s':>10} {'MB of one':>9} {'one s':>8}")
    for binary in (client for client in (bundled_adb(), other_adb()) if client):
        with tempfile.TemporaryDirectory(prefix="push-") as folder:
            measure(binary, files, Path(folder))


if __name__ == "__main__":
    main()
