"""All graphs of a run for all its SoCs: one failure stops no other graph, and nothing is compiled twice."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from qdq_graph import conv_silu_conv, refused

from sdconvert.artifacts import RunFolder
from sdconvert.config import load_recipe
from sdconvert.errors import CompileError
from sdconvert.export.artifact import ExportArtifact
from sdconvert.export.io_manifest import describe_io
from sdconvert.io.files import write_json_atomic
from sdconvert.qnn.contexts import compile_contexts
from sdconvert.stages import StageContext

SOCS = ("SM8550", "SM8650")


class Quiet:
    def step(self, done: int, total: int, note: str = "") -> None:
        pass


def export(run: RunFolder, **graphs: Callable[[Path], Path]) -> None:
    """An export of some graphs."""
    exported = ExportArtifact(run.stage_folder("50-export"))
    exported.folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic({graph: {} for graph in graphs}, exported.folder / "nodes.json")
    for graph, make in graphs.items():
        model = onnx.load(make(exported.onnx(graph)))
        exported.write_io(graph, describe_io(model, graph))


def stage(run: RunFolder) -> StageContext:
    out = run.root / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    recipe = load_recipe("pasd_tiny", [f"qnn.socs={list(SOCS)}".replace("'", '"')])
    return StageContext(recipe, out, run, Quiet(), "f" * 64)


def test_what_fails_is_named_and_the_rest_is_compiled_once(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    export(run, text_encoder=conv_silu_conv, unet=refused)
    context = stage(run)
    with pytest.raises(CompileError) as caught:
        compile_contexts(context)
    for soc in SOCS:
        assert f"{soc} refuses 1 node (Det `determinant_node`) in `unet.onnx`" in str(caught.value)
    assert "2 of 4 contexts are kept, and the same command goes on from there" in caught.value.hint
    assert not any(context.out.iterdir())
    # The log that the message names is still there.
    assert (context.scratch / "SM8650/unet.compile.log").is_file()

    export(run, text_encoder=conv_silu_conv, unet=conv_silu_conv)
    (context.scratch / "SM8650/.partial-unet-killed").mkdir()
    before = {soc: (context.scratch / soc / "text_encoder_qnn.bin").stat().st_mtime_ns for soc in SOCS}
    context = stage(run)
    found = compile_contexts(context)
    assert [(one.soc.name, one.graph) for one in found] == [
        (soc, graph) for soc in SOCS for graph in ("text_encoder", "unet")
    ]
    for one in found:
        assert one.bin.parent == context.out / one.soc.name
        assert one.bin.stat().st_size
        assert one.ctx_onnx.is_file()
        assert [tensor.name for tensor in (*one.inputs, *one.outputs)] == ["x", "y"]
    for soc in SOCS:
        assert (context.scratch / soc / "text_encoder_qnn.bin").stat().st_mtime_ns == before[soc]
    assert not list(context.out.rglob(".partial-*"))


def test_a_compiler_that_is_killed_is_told_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "run")
    export(run, text_encoder=conv_silu_conv, unet=conv_silu_conv)
    context = stage(run)
    # One process dies as by a system without memory, when it has written what it was to write.
    python = tmp_path / "python"
    dies = f"*{context.scratch}/SM8650/.partial-unet-*"
    python.write_text(f'#!/bin/sh\n"{sys.executable}" "$@"\ncase "$*" in {dies}) kill -KILL $$;; esac\n')
    python.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(python))
        with pytest.raises(CompileError, match=r"compiler of `unet.onnx` for SM8650 was killed by signal 9") as caught:
            compile_contexts(context)
    assert "out of memory" in caught.value.hint
    assert "3 of 4 contexts are kept" in caught.value.hint
    context = stage(run)
    assert len(compile_contexts(context)) == 4
