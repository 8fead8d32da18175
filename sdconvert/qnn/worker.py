"""One compile in a process of its own: `python -m sdconvert.qnn.worker ONNX CTX_ONNX RESULT SOC_MODEL MODE [DLC]`.

QNN logs to both standard streams, keeps gigabytes until the process ends, and names the nodes that it refuses only in
its log; a process gives the log a file, the memory back and a peak that belongs to this graph alone.
"""

import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from sdconvert.qnn.nodes import count_nodes
from sdconvert.qnn.phases import read_phases
from sdconvert.qnn.session import compiling_session, dlc_session


def _peak_rss_bytes() -> int:
    # VmHWM starts anew at exec; getrusage's maximum is inherited from the process that forked.
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) * 1024 if match else 0


def main(arguments: list[str]) -> None:
    """Compile as told and write what it took, its phases and the nodes as JSON to RESULT; paths are absolute."""
    onnx, ctx_onnx, result, soc_model, mode, *dlc = arguments
    start = time.perf_counter()
    # The graph's name inside of the context is a hash of the path as given: a bare name gives the same bytes anywhere.
    os.chdir(Path(onnx).parent)
    with tempfile.TemporaryDirectory(dir=Path(result).parent) as graphs:
        name, folder = Path(Path(onnx).name), Path(graphs)
        compiling_session(name, Path(ctx_onnx), int(soc_model), int(mode), folder)
        figures = {"seconds": time.perf_counter() - start, "peak_rss_bytes": _peak_rss_bytes()}
        nodes, phases = count_nodes(folder), read_phases(folder)
        for path in dlc:
            dlc_session(name, int(soc_model), folder)
            (written,) = folder.glob("*.dlc")
            written.replace(path)
    Path(result).write_text(json.dumps({**figures, "phases": phases, "nodes": nodes}))


if __name__ == "__main__":
    main(sys.argv[1:])
