"""Write the bundle: contexts, raw inputs and expected outputs, each file listed with its checksum.

    manifest.json                               what is here (manifest.py)
    sums.txt                                    `sha256sum -c` format, checked on the device
    models/<soc>/<graph>_qnn.bin, .ctx.onnx     contexts, and EPContext models for ONNX Runtime
    inputs/<id>/<tensor>.raw                    float32, or int32 for token ids; little endian, NCHW
    input_list_<graph>.txt                      qnn-net-run's format, one line per sample
    expected/<id>/<tensor>.fp32.raw             what the fp32 model answers
    expected/<id>/<tensor>.sim.<soc>.raw        what the context for that SoC answers in the simulator
    loop/                                       what sampling takes on this computer (loop_files.py)

The `.tar` beside the folder has the same bytes for the same content: names sorted, no times, no owners.
"""

import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from sdconvert.android.artifact import tar_path
from sdconvert.android.checks import Sample, check_contexts, check_samples
from sdconvert.android.loop_files import Loop, write_loop
from sdconvert.android.manifest import (
    LOOP,
    ChainRecord,
    FileRecord,
    GraphRecord,
    LoopRecord,
    Manifest,
    Role,
    SampleRecord,
    SocRecord,
    TensorRecord,
    input_list,
)
from sdconvert.errors import UsageError
from sdconvert.io.files import atomic_file, atomic_folder, sha256_file
from sdconvert.qnn.artifact import Context, TensorSpec

__all__ = ["Sample", "write_bundle"]


def write_bundle(
    out: Path,
    *,
    model: str,
    contexts: Sequence[Context],
    samples: Sequence[Sample],
    chains: Sequence[ChainRecord] = (),
    scheduler: Mapping[str, Any],
    metrics: Mapping[str, Any],
    loop: Loop | None = None,
) -> Manifest:
    """Write the folder `out` and `out` + `.tar`, replacing what was there; each appears whole or not at all.

    Args:
        out: The bundle's folder.
        model: Name of the model, for people.
        contexts: Compiled graphs; every graph for every SoC.
        samples: Test inputs with the answers expected; at least one per graph, ids unique in the bundle.
        chains: Models in several graphs.
        scheduler: JSON-able class name, configuration, timesteps and table of the sampler.
        metrics: JSON-able figures expected of the graphs.
        loop: What pictures are drawn with, if the graphs can sample.

    Raises:
        UsageError: A name has characters that runners rewrite, a tensor does not fit its graph or is not finite,
            contexts come from different compilers, or a graph has no sample.
        EnvironmentProblem: The disk is full.
    """
    check_contexts(contexts)
    check_samples(samples, contexts)
    # Contexts of one graph differ by SoC only: any of them knows the graph's tensors.
    by_graph = {context.graph: context for context in contexts}
    with atomic_folder(out) as folder:
        writer = _Writer(folder)
        graphs = tuple(writer.add_context(context) for context in contexts)
        for sample in samples:
            writer.add_sample(sample, by_graph[sample.graph])
        for graph, context in by_graph.items():
            writer.add_input_list(graph, context.inputs, [sample.id for sample in samples if sample.graph == graph])
        manifest = Manifest(
            model=model,
            qairt=contexts[0].info.qairt,
            socs=tuple({context.soc.name: _soc_record(context) for context in contexts}.values()),
            graphs=graphs,
            chains=tuple(chains),
            scheduler=dict(scheduler),
            samples=tuple(SampleRecord(id=sample.id, graph=sample.graph) for sample in samples),
            loop=writer.add_loop(loop) if loop else None,
            metrics=dict(metrics),
            files=writer.file_records(),
        )
        writer.finish(manifest)
    _write_tar(out)
    return manifest


class _Writer:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._roles: dict[str, Role] = {}

    def _new(self, path: str, role: Role) -> Path:
        self._roles[path] = role
        file = self._folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def add_context(self, context: Context) -> GraphRecord:
        # The EPContext model refers to its binary by file name: both names stay.
        base = f"models/{context.soc.name}"
        binary, epcontext = f"{base}/{context.bin.name}", f"{base}/{context.ctx_onnx.name}"
        shutil.copyfile(context.bin, self._new(binary, "context"))
        shutil.copyfile(context.ctx_onnx, self._new(epcontext, "epcontext"))
        return GraphRecord(
            name=context.graph,
            soc=context.soc.name,
            context=binary,
            epcontext=epcontext,
            inputs=_tensor_records(context.inputs),
            outputs=_tensor_records(context.outputs),
        )

    def add_sample(self, sample: Sample, context: Context) -> None:
        expected = f"expected/{sample.id}"
        self._add_tensors(f"inputs/{sample.id}", "raw", "input", sample.inputs, context.inputs)
        self._add_tensors(expected, "fp32.raw", "expected_fp32", sample.fp32, context.outputs)
        for soc, outputs in sample.sim.items():
            self._add_tensors(expected, f"sim.{soc}.raw", "expected_sim", outputs, context.outputs)

    def _add_tensors(
        self, base: str, suffix: str, role: Role, tensors: Mapping[str, torch.Tensor], specs: Sequence[TensorSpec]
    ) -> None:
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wanted = {spec.name: spec.shape for spec in specs}
        dtypes = {spec.name: np.dtype(spec.dtype).newbyteorder("<") for spec in specs}
        if found != wanted:
            raise UsageError(f"tensors {found} of `{base}` do not fit the graph", hint=f"it has {wanted}")
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise UsageError(f"tensor `{name}` of `{base}` is not finite", hint="NaN or infinity tests nothing")
            values = tensor.detach().cpu().contiguous().numpy().astype(dtypes[name])
            values.tofile(self._new(f"{base}/{name}.{suffix}", role))

    def add_input_list(self, graph: str, inputs: Sequence[TensorSpec], ids: Sequence[str]) -> None:
        text = input_list([spec.name for spec in inputs], ids)
        self._new(f"input_list_{graph}.txt", "input_list").write_text(text)

    def add_loop(self, loop: Loop) -> LoopRecord:
        record = write_loop(loop, self._folder)
        files = [path for path in (self._folder / LOOP).rglob("*") if path.is_file()]
        self._roles |= dict.fromkeys([path.relative_to(self._folder).as_posix() for path in files], "loop")
        return record

    def file_records(self) -> dict[str, FileRecord]:
        return {
            path: FileRecord(
                sha256=sha256_file(self._folder / path), bytes=(self._folder / path).stat().st_size, role=role
            )
            for path, role in sorted(self._roles.items())
        }

    def finish(self, manifest: Manifest) -> None:
        file = self._folder / "manifest.json"
        file.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        sums = {path: record.sha256 for path, record in manifest.files.items()} | {file.name: sha256_file(file)}
        (self._folder / "sums.txt").write_text("".join(f"{sums[path]}  {path}\n" for path in sorted(sums)))


def _tensor_records(specs: Sequence[TensorSpec]) -> tuple[TensorRecord, ...]:
    return tuple(TensorRecord(name=spec.name, dtype=_dtype(spec), shape=spec.shape) for spec in specs)


def _dtype(spec: TensorSpec) -> Literal["float32", "int32"]:
    return "int32" if spec.dtype == "int32" else "float32"


def _soc_record(context: Context) -> SocRecord:
    info = context.info
    return SocRecord(
        name=context.soc.name,
        soc_model=context.soc.soc_model,
        soc_type=info.soc_type,
        arch=info.arch,
        min_arch=info.min_arch,
        vtcm_mb=info.vtcm_mb,
        hvx_threads=info.hvx_threads,
    )


def _write_tar(folder: Path) -> None:
    with atomic_file(tar_path(folder)) as partial, tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            # A fresh TarInfo has no time, no owner and mode 0644.
            member = tarfile.TarInfo(f"{folder.name}/{path.relative_to(folder).as_posix()}")
            member.size = path.stat().st_size
            with path.open("rb") as file:
                archive.addfile(member, file)
