"""Compiling with Qualcomm's own compiler: what comes out, what is refused, and in which words."""

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from qdq_graph import conv_silu_conv, refused, signed_conv_output

from sdconvert.errors import CompileError, EnvironmentProblem, UsageError
from sdconvert.io.files import sha256_file
from sdconvert.qnn.context import Context, compile_context
from sdconvert.qnn.info import check_context_info, parse_context_info, read_context_info
from sdconvert.soc import find_soc

Compiled = Callable[[str, str], Context]


@pytest.mark.parametrize(
    ("soc", "said"),
    [
        ("SM8650", ("SM8650", 75, 75, 8, 4)),
        ("SM8550", ("SM8550", 73, 73, 8, 4)),
        ("SM8750", ("SM8750", 79, 79, 8, 6)),
        ("SM8475", ("SM8450", 69, 69, 8, 4)),
        ("SM7475", ("SM7475", 68, 69, 4, 4)),
    ],
)
def test_the_binary_says_what_the_table_says(compiled: Compiled, soc: str, said: tuple[str | int, ...]) -> None:
    context = compiled("conv", soc)
    info = context.info
    assert (info.soc_type, info.arch, info.min_arch, info.vtcm_mb, info.hvx_threads) == said
    assert info.qairt.startswith("2.51.0.")
    assert info == read_context_info(context.bin)


def test_the_whole_graph_is_one_context_under_its_own_names(compiled: Compiled) -> None:
    context = compiled("conv", "SM8650")
    assert context.cpu_nodes == 0
    assert [node.op_type for node in onnx.load(context.ctx_onnx).graph.node] == ["EPContext"]
    assert [(x.name, x.dtype, x.shape, x.nbytes) for x in context.inputs] == [("x", "float32", (1, 4, 16, 16), 4096)]
    assert [x.name for x in context.outputs] == ["y"]


def test_files_figures_and_nothing_else(compiled: Compiled) -> None:
    context = compiled("conv", "SM8650")
    assert (context.bin.name, context.ctx_onnx.name) == ("conv_qnn.bin", "conv.ctx.onnx")
    assert (context.bin.parent / "conv.compile.log").is_file()
    assert not list(context.bin.parent.glob(".partial-*"))
    assert 0 < context.seconds < 60
    assert 50e6 < context.peak_rss_bytes < 2e9
    assert list(context.phases)[:2] == ["Graph Preparation Initializing", "Graph Optimizations"]
    assert 0 < sum(context.phases.values()) < context.seconds


def test_a_dlc_of_the_same_graph_is_written_on_demand(compiled: Compiled, tmp_path: Path) -> None:
    graph = conv_silu_conv(tmp_path / "conv.onnx")
    context = compile_context(graph, tmp_path / "out", find_soc("SM8650"), dlc=True)
    assert sha256_file(context.bin) == sha256_file(compiled("conv", "SM8650").bin)
    with zipfile.ZipFile(tmp_path / "out/conv.dlc") as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    assert sizes["model.params.bin"] > 2 * 4 * 4 * 9
    assert not list(compiled("conv", "SM8650").bin.parent.glob("*.dlc"))


def test_compiling_elsewhere_gives_the_same_bytes(compiled: Compiled, tmp_path: Path) -> None:
    first = compiled("conv", "SM8650")
    second = compile_context(conv_silu_conv(tmp_path / "conv.onnx"), tmp_path, find_soc("SM8650"))
    assert sha256_file(first.bin) == sha256_file(second.bin)


def test_a_node_that_htp_refuses_is_named(tmp_path: Path) -> None:
    graph = refused(tmp_path / "bad.onnx")
    with pytest.raises(CompileError, match=r"SM8650 refuses 1 node \(Det `determinant_node`\) in `bad.onnx`") as caught:
        compile_context(graph, tmp_path / "out", find_soc("SM8650"))
    assert caught.value.exit_code == 6
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bad.compile.log"]


def test_int16_belongs_right_before_the_matmul_only(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="DequantizeLinear `weight_node`") as caught:
        compile_context(signed_conv_output(tmp_path / "signed.onnx"), tmp_path, find_soc("SM8650"))
    assert "a pair of its own before a MatMul" in caught.value.hint


def test_an_id_that_the_compiler_removed_is_a_compile_error(tmp_path: Path) -> None:
    soc = replace(find_soc("SM8650"), soc_model=14)
    with pytest.raises(CompileError, match="QNN_DEVICE_ERROR_INVALID_CONFIG"):
        compile_context(conv_silu_conv(tmp_path / "conv.onnx"), tmp_path, soc)


def test_a_context_for_another_soc_is_refused(tmp_path: Path) -> None:
    """The table says SM8650, the id is SM8550's: what a stale table would do."""
    soc = replace(find_soc("SM8650"), soc_model=43)
    with pytest.raises(CompileError, match="soc_type = SM8550, expected SM8650; arch = 73, expected 75"):
        compile_context(conv_silu_conv(tmp_path / "conv.onnx"), tmp_path / "out", soc)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["conv.compile.log"]


def test_finalization_mode_1_cannot_be_had(tmp_path: Path) -> None:
    graph = conv_silu_conv(tmp_path / "conv.onnx")
    with pytest.raises(UsageError, match="mode 1 is not offered"):
        compile_context(graph, tmp_path, find_soc("SM8650"), finalization_mode=1)  # type: ignore[arg-type]


def test_a_missing_graph_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no ONNX graph at"):
        compile_context(tmp_path / "none.onnx", tmp_path, find_soc("SM8650"))


def test_a_full_disk_is_not_blamed_on_the_graph(small_disk: Path, tmp_path: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(80 << 10))
    with pytest.raises(EnvironmentProblem, match="no space left"):
        compile_context(conv_silu_conv(tmp_path / "conv.onnx"), small_disk, find_soc("SM8650"))
    assert not list(small_disk.glob("*conv_qnn.bin"))


def test_what_is_no_context_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.bin").touch()
    with pytest.raises(CompileError, match="`empty.bin` carries no soc_type"):
        read_context_info(tmp_path / "empty.bin")


def test_two_socs_in_one_file_are_refused(compiled: Compiled) -> None:
    both = compiled("conv", "SM8650").bin.read_bytes() + compiled("conv", "SM8550").bin.read_bytes()
    with pytest.raises(CompileError, match="soc_type = SM8550 and SM8650"):
        parse_context_info(both, "both.bin")


def test_less_vtcm_than_the_soc_has_is_refused(compiled: Compiled) -> None:
    """`htp_arch` without `soc_model` compiles for 4 MB in silence."""
    info = replace(compiled("conv", "SM8650").info, vtcm_mb=4)
    with pytest.raises(CompileError, match="vtcm_mb = 4, expected 8"):
        check_context_info(info, find_soc("SM8650"), "half.bin")
