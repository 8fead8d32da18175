"""One pipeline object, four backends of its models: torch, simulated quantization, ONNX Runtime, QNN (D10)."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from static_graphs import SMALL_CONTROLNET, SMALL_UNET, vae_case
from tiny_parts import BYTES, text_config, without_zeros
from torch import Tensor
from transformers import CLIPTextModel

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.export.onnx_graph import to_onnx
from sdconvert.export.runner import OnnxRunner
from sdconvert.models.pasd import build_pasd
from sdconvert.pipelines.backend import GraphBackend, graph_adapters, swap_backends
from sdconvert.pipelines.pasd import PASDPipeline
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Simulation

GRAPHS = ("controlnet", "unet")
IMAGE = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(1))
Runner = Callable[[Tensors], Tensors]


class Recorder:
    """Keeps the inputs of the graphs."""

    def __init__(self, adapters: Mapping[str, ModelAdapter]) -> None:
        self.adapters = adapters
        self.samples: dict[str, list[Tensors]] = {graph: [] for graph in adapters}

    def record(self, component: str, inputs: dict[str, Any], **_: Any) -> None:
        self.samples[component].append(self.adapters[component].pack(inputs))


class Bench:
    """A pipeline of small models, its graphs, and their inputs in a run."""

    def __init__(self, tokenizer: Any, scheduler: Any) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet, controlnet = build_pasd(SMALL_UNET, SMALL_CONTROLNET)
            models = {"unet": unet.eval(), "controlnet": without_zeros(controlnet), "vae": vae_case().adapter.model}
            encoder = CLIPTextModel(text_config(12, **BYTES)).eval()
        self.pipe = PASDPipeline(**models, text_encoder=encoder, tokenizer=tokenizer, scheduler=scheduler)
        self.models = {graph: getattr(self.pipe, graph) for graph in GRAPHS}
        self.adapters = {name: one for name, one in graph_adapters(self.pipe, 1.0).items() if name in GRAPHS}
        recorder = Recorder({**graph_adapters(self.pipe, 1.0)})
        self.draw = partial(self.pipe, IMAGE, prompt="a cat", num_inference_steps=2, latent_tile=8, latent_overlap=2)
        self.torch_picture = self.draw(observer=recorder)
        self.samples = {graph: recorder.samples[graph] for graph in GRAPHS}

    def picture(self, runners: Mapping[str, Runner]) -> Tensor:
        """The picture with other backends; the original ones are back afterwards."""
        swap_backends(self.pipe, self.adapters, runners)
        assert all(isinstance(getattr(self.pipe, graph), GraphBackend) for graph in runners)
        try:
            return self.draw()
        finally:
            for graph, model in self.models.items():
                setattr(self.pipe, graph, model)


@pytest.fixture(scope="module")
def bench(pasd_folder: Path) -> Bench:
    loaded = PASDPipeline.from_pretrained(pasd_folder)
    return Bench(loaded.tokenizer, loaded.scheduler)


@pytest.fixture(scope="module")
def simulations(bench: Bench) -> dict[str, Simulation]:
    found = {}
    for graph in GRAPHS:
        found[graph] = Simulation(bench.adapters[graph], bench.samples[graph][0], load_settings({75}))
        found[graph].calibrate(bench.samples[graph])
    return found


def write_fp32(bench: Bench, graph: str, path: Path) -> Path:
    """The model as ONNX without a quantizer."""
    inputs = bench.samples[graph][0]
    with bench.adapters[graph].as_graph() as module, torch.no_grad():
        count = len(module(*inputs.values()))
        names = list(bench.adapters[graph].output_names(count))
        values = tuple(inputs.values())
        torch.onnx.export(
            module, values, path, dynamo=True, input_names=list(inputs), output_names=names, verbose=False
        )
    return path


def write_qdq(simulation: Simulation, example: Tensors, path: Path) -> Path:
    """The quantized model as the export stage writes it."""
    model = to_onnx(simulation, example, opset=21)
    onnx.save(model, str(path))
    return path


def psnr(reference: Tensor, other: Tensor) -> float:
    return float(-10 * torch.log10((reference - other).square().mean()))


def test_d10_torch_and_simulated_quantization_draw_with_one_pipeline(
    bench: Bench, simulations: dict[str, Simulation]
) -> None:
    simulated = bench.picture(simulations)
    assert psnr(bench.torch_picture, simulated) > 35
    assert not torch.equal(bench.torch_picture, simulated)
    assert torch.equal(bench.draw(), bench.torch_picture)


@pytest.mark.slow
def test_d10_torch_and_onnx_runtime_draw_the_same_picture(bench: Bench, tmp_path: Path) -> None:
    units = [*bench.pipe.units, *bench.pipe.post_units]
    runners = {graph: OnnxRunner(write_fp32(bench, graph, tmp_path / f"{graph}.onnx")) for graph in GRAPHS}
    picture = bench.picture(runners)
    assert float((picture - bench.torch_picture).abs().max()) <= 1e-3
    assert float(picture.std()) > 0.01
    assert [*bench.pipe.units, *bench.pipe.post_units] == units
    assert torch.equal(bench.draw(), bench.torch_picture)


@pytest.mark.slow
def test_d10_simulated_quantization_and_its_onnx_draw_the_same_picture(
    bench: Bench, simulations: dict[str, Simulation], tmp_path: Path
) -> None:
    simulated = bench.picture(simulations)
    runners = {
        graph: OnnxRunner(write_qdq(simulations[graph], bench.samples[graph][0], tmp_path / f"{graph}.onnx"))
        for graph in GRAPHS
    }
    assert float((bench.picture(runners) - simulated).abs().max()) <= 1e-3


@pytest.mark.slow
def test_d10_the_qnn_context_draws_the_picture_of_the_simulated_quantization(
    bench: Bench, simulations: dict[str, Simulation], tmp_path: Path
) -> None:
    from sdconvert.qnn.context import compile_context
    from sdconvert.qnn.simulator import Simulator
    from sdconvert.soc import find_soc

    runners = {}
    for graph in GRAPHS:
        path = write_qdq(simulations[graph], bench.samples[graph][0], tmp_path / f"{graph}.onnx")
        runners[graph] = Simulator(compile_context(path, tmp_path / "SM8650", find_soc("SM8650")).ctx_onnx)
    assert psnr(bench.picture(simulations), bench.picture(runners)) > 35
