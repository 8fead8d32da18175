"""What stands in for `qnn-net-run` on a phone of the rig: the context that ships, executed in Qualcomm's simulator.

It takes the options that `run.sh` gives and leaves what the real one leaves: `Result_<i>/<tensor>.raw` in float32, and
a profile. The profile is the one that Qualcomm's backend itself writes, in the rows of `qnn-profile-viewer`; its times
and cycles are this computer's, no figure of a device.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from sdconvert.qnn.session import context_session


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--retrieve_context", type=Path, required=True)
    parser.add_argument("--input_list", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_inferences", type=int)
    parser.add_argument("--duration", type=float, default=0)
    parser.add_argument("--keep_num_outputs", type=int)
    for name in ("--backend", "--log_level", "--perf_profile", "--profiling_level"):
        parser.add_argument(name)
    parser.add_argument("--use_native_input_files", action="store_true")
    options = parser.parse_args()
    # The real runner takes the binary alone; ONNX Runtime wants the model around it, which lies beside it.
    binary = options.retrieve_context
    log = options.output_dir / "qnn-profiling-data_0.log"
    session = context_session(
        binary.with_name(binary.name.replace("_qnn.bin", ".ctx.onnx")),
        {"profiling_level": options.profiling_level, "profiling_file_path": str(log)}
        if options.profiling_level
        else {},
    )
    inputs = {value.name: (value.shape, "<i4" if "int32" in value.type else "<f4") for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    lines = options.input_list.read_text().splitlines()
    count = options.num_inferences or len(lines)
    end = time.monotonic() + options.duration
    index = 0
    while time.monotonic() < end if options.duration else index < count:
        named = (word.split(":=") for word in lines[index % len(lines)].split())
        feed = {}
        for name, path in named:
            shape, own = inputs[name]
            feed[name] = np.fromfile(path, own if options.use_native_input_files else "<f4").reshape(shape).astype(own)
        values = session.run(outputs, feed)
        if options.keep_num_outputs is None or index < options.keep_num_outputs:
            folder = options.output_dir / f"Result_{index}"
            folder.mkdir(parents=True, exist_ok=True)
            for name, value in zip(outputs, values, strict=True):
                value.astype("<f4").tofile(folder / f"{name}.raw")
        index += 1


main()
