"""The nodes of a compiled graph by type, as QNN's provider handed them to the HTP compiler.

They tell what a rewrite saves: the ONNX file still holds every Transpose that the provider cancels against the HTP's
own layout, channels last, and lacks those that it adds.
"""

import json
from collections import Counter
from pathlib import Path

from sdconvert.io.files import read_json

_TENSOR_LOG = "_tensor_log"
_BINARY = "_qnn.bin"


def count_nodes(folder: Path) -> dict[str, int]:
    """Count the nodes of the graphs that the provider has described in a folder (`json_qnn_graph_dir`), by type."""
    files = [path for path in sorted(folder.glob("*.json")) if not path.stem.endswith(_TENSOR_LOG)]
    graphs = [json.loads(path.read_text(encoding="utf-8"))["graph"] for path in files]
    types = Counter(node["type"] for graph in graphs for node in graph["nodes"].values())
    return dict(types.most_common())


def nodes_path(binary: Path) -> Path:
    """Where the counts of a context binary `<graph>_qnn.bin` lie: `<graph>.nodes.json` beside it."""
    return binary.with_name(f"{binary.name.removesuffix(_BINARY)}.nodes.json")


def read_nodes(binary: Path) -> dict[str, int]:
    """The nodes of a context binary by type; empty if they were not written down."""
    path = nodes_path(binary)
    counts: dict[str, int] = read_json(path) if path.is_file() else {}
    return counts
