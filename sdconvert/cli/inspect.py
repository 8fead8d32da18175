"""`sdconvert inspect`: say what a file or folder holds, whichever of the road's kinds it is."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer

from sdconvert.cli.session import Session, Table, amount
from sdconvert.errors import UsageError

Summary = tuple[dict[str, Any], Table]


def inspect(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(help="What to look at.")],
    after: Annotated[
        Path | None, typer.Argument(help="An ONNX file or context binary to compare with, node type by node type.")
    ] = None,
) -> None:
    """Say what a file or folder holds, or what became of a graph.

    Takes a checkpoint, weights, encodings, an ONNX file, a context binary, a bundle, a stage or a run folder.
    """
    session: Session = ctx.obj
    if after is not None:
        data, table = _compare(path, after)
        session.show(data, f"{path} → {after}", table)
        return
    kind, describe = _recognize(path)
    data, table = describe(path)
    session.show({"path": str(path), "kind": kind, **data}, f"{path}: {kind}", table)


def _compare(path: Path, after: Path) -> Summary:
    """Nodes by type, before and after; the largest differences first."""
    kinds = [_recognize(one)[0] for one in (path, after)]
    if kinds[0] != kinds[1] or kinds[0] not in ("onnx", "context binary"):
        raise UsageError(
            f"`{path}` is {kinds[0]} and `{after}` is {kinds[1]}", hint="give two ONNX files, or two context binaries"
        )
    before, now = _operators(path), _operators(after)
    names = sorted(before | now, key=lambda name: (-abs(now[name] - before[name]), name))
    counts = {name: (before[name], now[name], now[name] - before[name]) for name in names}
    totals = (before.total(), now.total(), now.total() - before.total())
    rows = [(name, *map(str, (*found[:2], f"{found[2]:+}"))) for name, found in [*counts.items(), ("all", totals)]]
    columns = ("operator", "before", "after", "difference")
    operators = {name: dict(zip(columns[1:], found, strict=True)) for name, found in counts.items()}
    data = {"before": str(path), "after": str(after), "nodes": dict(zip(columns[1:], totals, strict=True))}
    return {**data, "operators": operators}, Table(columns, rows, right=columns[1:])


def _operators(path: Path) -> Counter[str]:
    from sdconvert.qnn.nodes import nodes_path, read_nodes

    kind, describe = _recognize(path)
    counts: dict[str, int] = describe(path)[0]["operators"] if kind == "onnx" else read_nodes(path)
    if not counts:
        raise UsageError(
            f"`{path}` says nothing about its nodes", hint=f"compile it again: `{nodes_path(path).name}` is missing"
        )
    return Counter(counts)


def _recognize(path: Path) -> tuple[str, Callable[[Path], Summary]]:
    if not path.exists():
        raise UsageError(f"`{path}` does not exist", hint="check the path")
    found = _recognize_folder(path) if path.is_dir() else _recognize_file(path)
    if found is None:
        raise UsageError(
            f"`{path}` is none of the things that a conversion reads or writes",
            hint="give a checkpoint, weights, *.encodings, *.onnx, a context *.bin, a bundle, a stage or a run folder",
        )
    return found


def _recognize_folder(path: Path) -> tuple[str, Callable[[Path], Summary]] | None:
    from sdconvert.artifacts import MANIFEST, Manifest

    if Manifest.load(path):
        return "stage", _stage
    if (path / MANIFEST).is_file():
        return "bundle", _bundle
    if (path / "model_index.json").is_file():
        return "checkpoint", _checkpoint
    if (path / "recipe.resolved.yaml").is_file():
        return "run", _run
    return ("model", _model) if (path / "config.json").is_file() else None


def _recognize_file(path: Path) -> tuple[str, Callable[[Path], Summary]] | None:
    if path.suffix == ".bin":
        with path.open("rb") as file:
            start = file.read(2)
        # Torch writes zip files, or pickles of protocol 2 before its version 1.6.
        return ("weights", _weights) if start in (b"PK", b"\x80\x02") else ("context binary", _context)
    kinds: dict[str, tuple[str, Callable[[Path], Summary]]] = {
        ".safetensors": ("weights", _weights),
        ".pth": ("weights", _weights),
        ".pt": ("weights", _weights),
        ".encodings": ("encodings", _encodings),
        ".onnx": ("onnx", _onnx),
        ".tar": ("bundle", _bundle),
    }
    return kinds.get(path.suffix)


def _weights(path: Path) -> Summary:
    from sdconvert.io.tensors import tensor_shapes

    shapes = tensor_shapes(path)
    tensors: Counter[str] = Counter(name.partition(".")[0] for name in shapes)
    parameters: Counter[str] = Counter()
    for name, shape in shapes.items():
        parameters[name.partition(".")[0]] += prod(shape)
    data = {"tensors": len(shapes), "parameters": parameters.total(), "bytes": path.stat().st_size}
    rows = [(part, tensors[part], f"{parameters[part]:,}") for part in tensors]
    rows.append((f"all ({amount(data['bytes'])})", data["tensors"], f"{data['parameters']:,}"))
    return data, Table(("part", "tensors", "parameters"), rows, right=("tensors", "parameters"))


def _model(path: Path) -> Summary:
    from sdconvert.io.weights_index import weights_file

    is_transformers = (path / "model.safetensors").is_file() or (path / "pytorch_model.bin").is_file()
    data, table = _weights(weights_file(path, "model" if is_transformers else "diffusion_pytorch_model"))
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    name = config.get("_class_name") or " ".join(config.get("architectures", ["unnamed"]))
    return {"class": name, **data}, Table(table.columns, [(name, "", ""), *table.rows], table.right)


def _checkpoint(path: Path) -> Summary:
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    components = {}
    for folder in sorted(path.iterdir()):
        if (folder / "config.json").is_file():
            components[folder.name], _ = _model(folder)
    rows = [
        (name, c["class"], c["tensors"], f"{c['parameters']:,}", amount(c["bytes"])) for name, c in components.items()
    ]
    columns = ("component", "class", "tensors", "parameters", "size")
    data = {"pipeline": index.get("_class_name"), "components": components}
    return data, Table(columns, rows, right=columns[2:])


def _encodings(path: Path) -> Summary:
    from sdconvert.io.encodings import describe, read_encodings_file

    data = describe(read_encodings_file(path))
    rows = [
        (name, section["entries"], ", ".join(f"{count} {grid}" for grid, count in section["grids"].items()))
        for name, section in data["sections"].items()
    ]
    columns = ("section", "entries", f"grids (version {data['version']}, activations by {data['activations_by']})")
    return data, Table(columns, rows, right=("entries",))


def _onnx(path: Path) -> Summary:
    import onnx

    model = onnx.load(path, load_external_data=False)
    operators = Counter(node.op_type for node in model.graph.node)
    data: dict[str, Any] = {
        "opset": {opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        "nodes": operators.total(),
        "operators": dict(operators.most_common()),
        "inputs": {value.name: _shape(value) for value in model.graph.input},
        "outputs": {value.name: _shape(value) for value in model.graph.output},
    }
    rows = [(kind, name, str(shape)) for kind in ("inputs", "outputs") for name, shape in data[kind].items()]
    rows += [("operator", name, str(count)) for name, count in operators.most_common()]
    return data, Table(("what", "name", "shape or count"), rows)


def _shape(value: Any) -> list[int | str]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


def _context(path: Path) -> Summary:
    from sdconvert.qnn.info import read_context_info
    from sdconvert.qnn.nodes import read_nodes

    data = {**asdict(read_context_info(path)), "bytes": path.stat().st_size}
    nodes = read_nodes(path)
    rows = [*data.items(), *((f"nodes: {name}", count) for name, count in nodes.items())]
    return {**data, "nodes": nodes} if nodes else data, Table(("property", "value"), rows)


def _bundle(path: Path) -> Summary:
    from sdconvert.android.verify import describe_bundle

    data = describe_bundle(path)
    rows = [(graph["soc"], graph["name"], amount(graph["context_bytes"])) for graph in data["graphs"]]
    rows.append(("all", f"{len(data['samples'])} samples, {data['files']} files", amount(data["bytes"])))
    return data, Table(("soc", "graph", "size"), rows, right=("size",))


def _stage(path: Path) -> Summary:
    from sdconvert.artifacts import RunFolder

    manifest = RunFolder(path.parent).manifest(path.name)
    data = manifest.model_dump() if manifest else {}
    rows = [("file", name, amount(output["bytes"])) for name, output in data["outputs"].items()]
    rows += [("metric", name, str(value)) for name, value in data["metrics"].items()]
    rows += [("took", f"{data['seconds']:.1f} s", amount(data["peak_rss_bytes"]))]
    return data, Table(("what", "name", "value"), rows)


def _run(path: Path) -> Summary:
    from sdconvert.artifacts import RunFolder
    from sdconvert.cli.road import ROAD

    manifests = {stage: RunFolder(path).manifest(stage) for stage in ROAD}
    done = {stage: manifest for stage, manifest in manifests.items() if manifest}
    rows = [
        (stage, amount(sum(o.bytes for o in m.outputs.values())), f"{m.seconds:.1f}", amount(m.peak_rss_bytes))
        for stage, m in done.items()
    ]
    columns = ("stage", "size", "seconds", "peak memory")
    return {"stages": {stage: m.model_dump() for stage, m in done.items()}}, Table(columns, rows, right=columns[1:])
