"""Every graph of the embedded model on eight SoCs, compiled and run; the table of docs/precision.md.

    pytest -m slow tests/qnn/test_eight_socs.py --junitxml=figures.xml

writes what was measured as properties of each test.
"""

import resource
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest
from pasd_tiny_graphs import Exported, PasdTiny

from sdconvert.config import GatesSection
from sdconvert.metrics import worst_sqnr_db
from sdconvert.pipelines.backend import GRAPHS
from sdconvert.qnn.context import compile_context
from sdconvert.qnn.simulator import Simulator
from sdconvert.quantize.settings import load_settings
from sdconvert.soc import find_soc

# SoC, generation, MiB of VTCM. QCS6490 has no floating point.
SOCS = {
    "SM8350": (68, 4),
    "QCS6490": (68, 2),
    "SM8450": (69, 8),
    "SM8550": (73, 8),
    "SC8380XP": (73, 8),
    "SM8650": (75, 8),
    "SM8750": (79, 8),
    "SM8850": (81, 8),
}
Quantized = Callable[[int], Mapping[str, Exported]]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """The graphs for a generation, made once for all generations that share their settings."""
    model = PasdTiny()

    @cache
    def export(settings: str, arch: int) -> Mapping[str, Exported]:
        return model.export(arch, tmp_path_factory.mktemp(settings))

    def graphs(arch: int) -> Mapping[str, Exported]:
        settings = load_settings({arch})
        return export(settings.name, settings.architectures[0])

    return graphs


def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("soc", SOCS)
def test_the_graph_is_whole_on_the_soc_and_computes_what_the_quantized_model_does(
    quantized: Quantized, tmp_path: Path, record_property: Callable[[str, object], None], soc: str, graph: str
) -> None:
    target = find_soc(soc)
    exported, before = quantized(target.arch)[graph], cpu_seconds_of_children()
    context = compile_context(exported.onnx, tmp_path, target)
    record_property("cpu_seconds", cpu_seconds_of_children() - before)
    agreement = worst_sqnr_db(exported.simulated, Simulator(context.ctx_onnx)(exported.inputs))
    record_property("context_kib", context.bin.stat().st_size / 1024)
    record_property("peak_rss_mib", context.peak_rss_bytes / 2**20)
    record_property("simulator_vs_quantized_db", agreement)
    record_property("cpu_nodes", context.cpu_nodes)
    assert context.cpu_nodes == 0
    assert (context.info.soc_type, context.info.arch, context.info.vtcm_mb) == (soc, *SOCS[soc])
    gates = GatesSection()
    assert agreement >= getattr(gates, gates.key_of("simulator_vs_quantized_db", target.arch))
