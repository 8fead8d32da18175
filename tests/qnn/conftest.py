"""Contexts that several tests of the compiler share: compiled once per session."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from qdq_graph import conv_silu_conv, group_norm, matmul

from sdconvert.qnn.context import Context, compile_context
from sdconvert.soc import find_soc

GRAPHS: dict[str, Callable[[Path], Path]] = {
    "conv": conv_silu_conv,
    "group_norm": group_norm,
    "matmul_u16_u16": lambda path: matmul(path, symmetric_second=False),
    "matmul_u16_s16": lambda path: matmul(path, symmetric_second=True),
}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Context]:
    """Compile one of GRAPHS for a SoC, the first time that it is asked for."""
    folder = tmp_path_factory.mktemp("contexts")

    @cache
    def compile_once(graph: str, soc: str) -> Context:
        return compile_context(GRAPHS[graph](folder / f"{graph}.onnx"), folder / soc, find_soc(soc))

    return compile_once
