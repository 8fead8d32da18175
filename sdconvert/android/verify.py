"""Read a bundle, folder or tar, and believe nothing in it that can be recomputed.

The device's loader notices neither flipped bytes nor a context for another SoC; these checks are the ones there are.
"""

import hashlib
import json
import mmap
import re
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sdconvert import __version__
from sdconvert.android.manifest import BUNDLE_PATH, Manifest, input_list
from sdconvert.errors import CompileError, UsageError
from sdconvert.io.files import explain_disk_full
from sdconvert.qnn.artifact import parse_context_info

_SHOWN = 10
_AGAIN = "package it again"
_UNLISTED = {"manifest.json", "sums.txt"}


def verify_bundle(path: Path) -> Manifest:
    """Recompute every checksum and size, and compare contexts and tensors with the manifest.

    Raises:
        UsageError: It is no bundle, or files are missing, foreign, damaged, of another SoC or of the wrong size; the
            message names them.
    """
    files = _open(path)
    manifest = _manifest(path, files)
    problems = [
        *_sum_problems(manifest, files),
        *_context_problems(manifest, files),
        *_tensor_problems(manifest),
        *_list_problems(manifest, files),
    ]
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UsageError(f"bundle `{path}` is damaged:\n{shown}{more}", hint=_AGAIN)
    return manifest


def describe_bundle(path: Path) -> dict[str, Any]:
    """Return a summary of a bundle as JSON-able data: model, build, SoCs, graphs with sizes, samples, figures.

    Raises:
        UsageError: It is no bundle.
    """
    manifest = _manifest(path, _open(path))
    return {
        "model": manifest.model,
        "qairt": manifest.qairt,
        "socs": [soc.model_dump() for soc in manifest.socs],
        "graphs": [
            {
                "name": graph.name,
                "soc": graph.soc,
                "context_bytes": manifest.files[graph.context].bytes,
                "inputs": {tensor.name: list(tensor.shape) for tensor in graph.inputs},
                "outputs": {tensor.name: list(tensor.shape) for tensor in graph.outputs},
            }
            for graph in manifest.graphs
        ],
        "samples": [sample.id for sample in manifest.samples],
        "pictures": list(manifest.loop.pictures) if manifest.loop else [],
        "metrics": manifest.metrics,
        "files": len(manifest.files) + len(_UNLISTED),
        "bytes": sum(file.bytes for file in manifest.files.values()),
    }


@contextmanager
def opened_bundle(path: Path) -> Iterator[tuple[Path, Manifest]]:
    """Verify a bundle, and give its folder and manifest; a tar is unpacked into a temporary folder for as long.

    Raises:
        UsageError: As `verify_bundle`.
        EnvironmentProblem: The disk is full.
    """
    manifest = verify_bundle(path)
    if path.is_dir():
        yield path, manifest
        return
    with tempfile.TemporaryDirectory(prefix="sdconvert-") as scratch:
        folder = Path(scratch)
        with explain_disk_full(folder):
            # Verified: these are the names in the manifest, none of which leads out of a folder.
            for name, view in _open(path).items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(view)
        yield folder, manifest


def _open(path: Path) -> dict[str, memoryview]:
    """Map every file of a bundle into memory, by its path in the bundle; a tar is not unpacked."""
    if path.is_dir():
        links = [x.relative_to(path).as_posix() for x in sorted(path.rglob("*")) if x.is_symlink()]
        if links:
            raise UsageError(f"`{links[0]}` of bundle `{path}` is a link, and may lead out of it", hint=_AGAIN)
        return {x.relative_to(path).as_posix(): _map(x) for x in sorted(path.rglob("*")) if x.is_file()}
    if not path.is_file():
        raise UsageError(f"no bundle at `{path}`", hint="give a bundle's folder or its .tar")
    view = _map(path)
    files: dict[str, memoryview] = {}
    for member in _members(path, view):
        whole = member.name.removeprefix("./")
        name = whole.partition("/")[2]
        if not re.fullmatch(BUNDLE_PATH, whole) or not name:
            raise UsageError(f"`{member.name}` of `{path}` leads out of the bundle", hint=_AGAIN)
        if not member.isfile():
            raise UsageError(f"`{member.name}` of `{path}` is no file, and may lead out of the bundle", hint=_AGAIN)
        if name in files:
            raise UsageError(f"`{path}` holds `{name}` twice", hint=_AGAIN)
        files[name] = view[member.offset_data : member.offset_data + member.size]
    return files


def _members(path: Path, view: memoryview) -> list[tarfile.TarInfo]:
    try:
        with tarfile.open(path, "r:") as archive:
            members = [member for member in archive if not member.isdir()]
            end = archive.offset
    except tarfile.TarError as error:
        if not tarfile.is_tarfile(path):
            raise UsageError(
                f"`{path}` is no readable tar: {error}", hint="give a bundle's .tar, not packed"
            ) from error
        raise UsageError(f"`{path}` ends early: {error}", hint="copy it again, or package it again") from error
    # A whole tar ends with two blocks of zeros; one that was cut between two files reads like a shorter one.
    if len(view) < end + 2 * tarfile.BLOCKSIZE:
        raise UsageError(f"`{path}` ends early, after {len(members)} files", hint="copy it again, or package it again")
    return members


def _map(path: Path) -> memoryview:
    if path.stat().st_size == 0:
        return memoryview(b"")
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _manifest(path: Path, files: dict[str, memoryview]) -> Manifest:
    if "manifest.json" not in files:
        raise UsageError(f"`{path}` has no manifest.json", hint="give a bundle's folder or its .tar")
    content = bytes(files["manifest.json"])
    _check_version(path, content)
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"][:1] == ("files",) and first["loc"][-1] == "[key]":
            told = f"manifest.json of `{path}` names {first['input']!r}, which could lead out of the bundle"
            raise UsageError(told, hint=_AGAIN) from error
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise UsageError(f"manifest.json of `{path}` is damaged: {where}: {first['msg']}", hint=_AGAIN) from error


def _check_version(path: Path, content: bytes) -> None:
    try:
        data = json.loads(content)
    except ValueError:
        return  # The manifest's own validation says where.
    version = data.get("schema_version") if isinstance(data, dict) else None
    known = Manifest.model_fields["schema_version"].default
    if isinstance(version, int) and version != known:
        raise UsageError(
            f"bundle `{path}` is of format {version}; this sdconvert {__version__} reads format {known}",
            hint="package it again with this sdconvert, or use the one that wrote it",
        )


def _sum_problems(manifest: Manifest, files: dict[str, memoryview]) -> Iterator[str]:
    listed = manifest.files.keys() | _UNLISTED
    yield from (f"{name}: missing" for name in sorted(listed - files.keys()))
    yield from (f"{name}: not in the manifest" for name in sorted(files.keys() - listed))
    sums = {name: hashlib.sha256(view).hexdigest() for name, view in files.items() if name != "sums.txt"}
    for name, record in manifest.files.items():
        if name in sums and sums[name] != record.sha256:
            found = f"{len(files[name])} bytes with sha256 {sums[name]}"
            yield f"{name}: {found}, should be {record.bytes} with {record.sha256}"
        elif name in files and len(files[name]) != record.bytes:
            yield f"{name}: {len(files[name])} bytes, the manifest says {record.bytes}"
    # sums.txt vouches for the manifest, and the device trusts it alone.
    written = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()
    if "sums.txt" in files and files["sums.txt"] != written:
        own = f"{sums['manifest.json']}  manifest.json\n".encode()
        if own not in bytes(files["sums.txt"]):
            yield "manifest.json: was changed after the bundle was written, or sums.txt was"
        else:
            yield "sums.txt: does not list the files as they are"


def _context_problems(manifest: Manifest, files: dict[str, memoryview]) -> Iterator[str]:
    socs = {soc.name: soc for soc in manifest.socs}
    for graph in manifest.graphs:
        if graph.context not in files:
            continue
        try:
            info = parse_context_info(files[graph.context], graph.context)
        except CompileError as error:
            yield f"{graph.context}: {error.args[0]}"
            continue
        if graph.context != (place := f"models/{graph.soc}/{graph.name}_qnn.bin"):
            yield f"{graph.context}: the device looks for the context of `{graph.name}` at {place}"
        soc = socs[graph.soc]
        for key in ("soc_type", "arch", "min_arch", "vtcm_mb", "hvx_threads"):
            if getattr(info, key) != getattr(soc, key):
                yield f"{graph.context}: says {key} = {getattr(info, key)}, the manifest {getattr(soc, key)}"
        if info.qairt != manifest.qairt:
            yield f"{graph.context}: says QAIRT {info.qairt}, the manifest {manifest.qairt}"


def _tensor_problems(manifest: Manifest) -> Iterator[str]:
    graphs = {graph.name: graph for graph in manifest.graphs}
    for sample in manifest.samples:
        graph = graphs[sample.graph]
        wanted = {f"inputs/{sample.id}/{tensor.name}.raw": tensor for tensor in graph.inputs}
        for tensor in graph.outputs:
            wanted[f"expected/{sample.id}/{tensor.name}.fp32.raw"] = tensor
            simulated = (f"expected/{sample.id}/{tensor.name}.sim.{soc.name}.raw" for soc in manifest.socs)
            wanted |= {name: tensor for name in simulated if name in manifest.files}
        for name, tensor in wanted.items():
            nbytes = 4 * prod(tensor.shape)
            if name not in manifest.files:
                yield f"{name}: not in the manifest, but sample `{sample.id}` needs it"
            elif manifest.files[name].bytes != nbytes:
                yield f"{name}: {manifest.files[name].bytes} bytes, its shape {list(tensor.shape)} says {nbytes}"


def _list_problems(manifest: Manifest, files: dict[str, memoryview]) -> Iterator[str]:
    """The device reads whatever its lists name: they have to name the samples, and nothing else."""
    for graph in {graph.name: graph for graph in manifest.graphs}.values():
        name = f"input_list_{graph.name}.txt"
        ids = [sample.id for sample in manifest.samples if sample.graph == graph.name]
        names = [tensor.name for tensor in graph.inputs]
        if name not in manifest.files:
            yield f"{name}: not in the manifest, but graph `{graph.name}` needs it"
        elif name in files and files[name] != input_list(names, ids).encode():
            yield f"{name}: does not name the samples of `{graph.name}`"
