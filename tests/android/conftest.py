"""A real bundle to look into, compiled for two SoCs with the simulator's answers, and phones with real adb clients."""

from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from adb_rig import Rig, adb_environment, bundled_adb, other_adb
from bundle_request import GATE, BundleRequest

from sdconvert.android.bundle import Sample
from sdconvert.qnn.context import compile_context
from sdconvert.qnn.simulator import Simulator
from sdconvert.soc import find_soc


@pytest.fixture(scope="session")
def asked(tmp_path_factory: pytest.TempPathFactory) -> BundleRequest:
    folder = tmp_path_factory.mktemp("gate")
    model = onnx.parser.parse_model(GATE)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "gate.onnx")
    contexts = [compile_context(folder / "gate.onnx", folder / soc, find_soc(soc)) for soc in ("SM8650", "SM8550")]
    simulators = {context.soc.name: Simulator(context.ctx_onnx) for context in contexts}
    generator, samples = torch.Generator().manual_seed(0), []
    for name in ("gate-chelsea", "gate-china"):
        inputs = {key: torch.randn(1, 3, 8, 8, generator=generator) for key in ("latent", "residual")}
        fp32 = {"out_sample": inputs["latent"] * inputs["residual"].sigmoid()}
        sim = {soc: simulator(inputs) for soc, simulator in simulators.items()}
        samples.append(Sample(id=name, graph="gate", inputs=inputs, fp32=fp32, sim=sim))
    return BundleRequest(contexts, samples)


@pytest.fixture(scope="session")
def bundle(asked: BundleRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle's folder; its tar lies beside it. Tests that damage one take a copy."""
    return asked.write(tmp_path_factory.mktemp("android") / "bundle")


CLIENTS = [client for client in (bundled_adb(), other_adb()) if client]


@pytest.fixture(scope="session", params=CLIENTS, ids=["bundled", "PATH"][: len(CLIENTS)])
def adb_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, str]]]:
    """A client, and the variables that lead it to a server of its own."""
    folder = tmp_path_factory.mktemp("adb")
    environment = adb_environment(folder)
    yield request.param, environment
    Rig(request.param, environment, folder).kill_server()


@pytest.fixture
def rig(adb_server: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    binary, environment = adb_server
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    rig = Rig(binary, environment, tmp_path)
    yield rig
    rig.close()
