"""Benchmark a bundle behind adb without a phone: real adb, a daemon on loopback, run.sh, and the HTP simulator.

Every answer, every picture that is drawn in a closed loop, and the noise of every step of fp32's runs have to be
bit-equal to the simulator's when the bundle was written. Times are this computer's.
Run by `make bench-sim`, which has tests/android on PYTHONPATH; needs the development packages, and no network.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from adb_rig import Rig, adb_environment, bundled_adb

from sdconvert.android.adb import Adb
from sdconvert.android.bench import bench, bench_page
from sdconvert.android.device import ask_phone, choose_soc
from sdconvert.android.measure import Job
from sdconvert.android.push import local_file
from sdconvert.android.runners import PhoneRunner, graphs_of
from sdconvert.android.timing import LoopMode, Plan
from sdconvert.android.verify import verify_bundle

_REMOTE = "/data/local/tmp/sdconvert"


def main() -> None:
    """Run every graph of a bundle on the rig's phone, draw its pictures there, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--inferences", type=int, default=1)
    parser.add_argument("--loops", nargs="*", choices=get_args(LoopMode), default=get_args(LoopMode))
    options = parser.parse_args()
    manifest = verify_bundle(options.bundle)
    with tempfile.TemporaryDirectory(prefix="bench-sim-") as scratch:
        folder = Path(scratch)
        environment = adb_environment(folder)
        os.environ.update(environment)
        rig = Rig(bundled_adb(), environment, folder)
        try:
            phone = rig.phone(soc=manifest.socs[0].name)
            adb = Adb(rig.binary, phone.daemon.serial)
            asked = ask_phone(adb, _REMOTE)
            soc = choose_soc(manifest, asked)
            files = {
                graph.epcontext: local_file(options.bundle / graph.epcontext) for graph in graphs_of(manifest, soc)
            }
            files["bin/qnn-net-run"] = local_file(phone.stand_in_runner(folder))
            runner = PhoneRunner(adb, asked, soc, files, None, _REMOTE, limit_s=3600, warm_up=0)
            job = Job(options.bundle, manifest, runner)
            [result] = bench(
                [job], [folder / "result"], Plan(inferences=options.inferences, loops=tuple(options.loops))
            )
        finally:
            rig.close()
            rig.kill_server()
    print(bench_page({**result, "is_device": False}))
    compared = dict(_compared(result))
    if other := [name for name, equal in compared.items() if not equal]:
        sys.exit(f"not bit-equal to the simulator when the bundle was written: {', '.join(other)}")
    print(f"bit-equal to what was recorded when the bundle was written: {', '.join(compared)}")


def _compared(result: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yield what was compared with the simulator, and whether it is bit-equal."""
    for graph in result["graphs"]:
        for name, kinds in graph["outputs"].items():
            yield f"{graph['name']}:{name}", kinds["vs_simulator"]["bit_equal"]
    for name, figures in result.get("closed_loop", {}).get("pictures", {}).items():
        yield f"picture {name}", figures["vs_simulator"]["bit_equal"]
    for step in result.get("teacher_forced", {}).get("steps", ()):
        yield f"step {step['step']}", step["vs_simulator"]["bit_equal"]


if __name__ == "__main__":
    main()
