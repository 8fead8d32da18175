"""A stock UNet of Stable Diffusion's shape on the HTP: ONNX Runtime's documented QNN recipe beside sdconvert's road.

python benchmarks/ort_recipe.py [--soc SM8650] [--latent 16] [--channels 64 128 256 256] [--samples 8] [--opsets 20 21]

One diffusers `UNet2DConditionModel`, seeded, and the same calibration inputs for both. The recipe is that of ONNX
Runtime's page on its QNN provider: `qnn_preprocess_model`, `get_qnn_qdq_config` (uint16 activations, uint8 weights),
`quantize`; the graph comes from PyTorch's exporter with its defaults. Nodes that the HTP refuses run on the CPU there,
which sdconvert never allows. SQNR is of the simulator's answer to unseen inputs, against the model in float32. No
figure is a device's time.
"""

import argparse
import os
import platform
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from diffusers import UNet2DConditionModel
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize
from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config, qnn_preprocess_model
from torch import Tensor

from sdconvert.adapters import GraphSize, Tensors
from sdconvert.adapters.unet_2d_condition import UNet2DConditionModelAdapter
from sdconvert.export.compiler_graph import graph_for_compiler
from sdconvert.metrics import sqnr_db
from sdconvert.models.attention import SHAAttentionPatch
from sdconvert.models.rewrites import REWRITES, apply_rewrites
from sdconvert.qnn.context import compile_context
from sdconvert.qnn.simulator import Simulator
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Simulation
from sdconvert.soc import Soc, find_soc

PROVIDER, RECIPE = "QNNExecutionProvider", "recipe.onnx"
NAMES = ("sample", "timestep", "encoder_hidden_states")


class Reader(CalibrationDataReader):
    """Calibration inputs, one after another."""

    def __init__(self, samples: Sequence[dict[str, np.ndarray]]) -> None:
        self._rest = iter(samples)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next, or nothing."""
        return next(self._rest, None)


def stock_unet(channels: Sequence[int]) -> UNet2DConditionModel:
    """The diffusers class with Stable Diffusion 1.5's config but for its widths."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=tuple(channels), cross_attention_dim=768, attention_head_dim=8, norm_num_groups=32
    ).eval()


def model_call(inputs: Tensors, seed: int) -> Tensors:
    """What the model itself takes: the timestep instead of its sinusoids."""
    kept = {name: tensor for name, tensor in inputs.items() if name != "t_emb"}
    return {**kept, "timestep": torch.tensor([(seed * 397 + 1) % 1000])}


def by_recipe(unet: UNet2DConditionModel, calls: Sequence[Tensors], soc: Soc, opset: int, folder: Path) -> None:
    """Export, quantize and compile as documented, into `recipe.onnx` and its contexts; in a process of its own."""
    plain, prepared, quantized = (folder / f"{stem}.onnx" for stem in ("plain", "prepared", "quantized"))
    options: dict[str, Any] = {"input_names": list(NAMES), "output_names": ["out_sample"], "opset_version": opset}
    torch.onnx.export(unet, tuple(calls[0][name] for name in NAMES), plain, dynamo=True, **options)
    source = prepared if qnn_preprocess_model(plain, prepared) else plain
    reader = Reader([{name: call[name].numpy() for name in NAMES} for call in calls])
    config = get_qnn_qdq_config(source, reader, activation_type=QuantType.QUInt16, weight_type=QuantType.QUInt8)
    quantize(source, quantized, config)
    # As documented, but that nodes may fall back to the CPU: they are what is counted.
    entries = {"context_enable": "1", "context_file_path": str(folder / RECIPE), "context_embed_mode": "0"}
    qnn_session(quantized, {f"ep.{key}": value for key, value in entries.items()}, soc_model=str(soc.soc_model))


def run_recipe(model: Path, inputs: Tensors) -> Tensor:
    """Run what was compiled in the simulator; in a process of its own."""
    session = qnn_session(model, {})
    (answer,) = session.run(None, {value.name: inputs[value.name].numpy() for value in session.get_inputs()})
    return torch.from_numpy(answer)


def qnn_session(model: Path, entries: dict[str, str], **options: str) -> Any:
    """A session on the HTP, and on the CPU for what that refuses."""
    import onnxruntime
    import onnxruntime_qnn

    onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]
    session_options = onnxruntime.SessionOptions()
    for key, value in entries.items():
        session_options.add_session_config_entry(key, value)
    backend = {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), **options}
    session_options.add_provider_for_devices(devices, backend)
    return onnxruntime.InferenceSession(str(model), session_options)


def by_sdconvert(
    unet: UNet2DConditionModel, inputs: Sequence[Tensors], unseen: Tensors, soc: Soc, folder: Path
) -> tuple[Path, Tensor]:
    """Per head, quantized, exported, compiled and run as the product does it."""
    SHAAttentionPatch.wrap_model("sha", unet).fuse()
    apply_rewrites(unet, REWRITES)
    simulation = Simulation(UNet2DConditionModelAdapter(unet), inputs[0], load_settings({soc.arch}))
    simulation.calibrate(inputs)
    path = folder / "unet.onnx"
    onnx.save(graph_for_compiler(simulation, inputs[0]), str(path))
    context = compile_context(path, folder / "compiled", soc)
    return context.ctx_onnx, Simulator(context.ctx_onnx)(unseen)["out_sample"]


def main() -> None:
    """Run both and print a table."""
    parser = argparse.ArgumentParser(description="ONNX Runtime's recipe for the HTP, and ours.")
    parser.add_argument("--soc", default="SM8650")
    parser.add_argument("--latent", type=int, default=16)
    parser.add_argument("--channels", type=int, nargs=4, default=[64, 128, 256, 256])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--opsets", type=int, nargs="+", default=[20, 21], help="of the recipe's graph, one row each")
    given = parser.parse_args()
    soc = find_soc(given.soc)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", end="")
    print("".join(f", {name} {version(name)}" for name in ("torch", "onnxruntime", "onnxruntime-qnn")), flush=True)
    unet = stock_unet(given.channels)
    adapter = UNet2DConditionModelAdapter(unet)
    spec = adapter.io_spec(GraphSize(given.latent, given.latent))
    *calls, unseen = (model_call(adapter.dummy_inputs(spec, seed), seed) for seed in range(given.samples + 1))
    with torch.no_grad():
        expected = unet(**unseen).sample
    print("| | nodes on the CPU | contexts | context KiB | SQNR dB |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for opset in given.opsets:
            recipe = Path(folder) / str(opset)
            recipe.mkdir()
            print_recipe(opset, recipe, (unet, calls, soc, opset, recipe), unseen, expected)
        inputs = [adapter.pack(call) for call in calls]
        context, answer = by_sdconvert(unet, inputs, adapter.pack(unseen), soc, Path(folder))
        print_row("sdconvert", context, f"{sqnr_db(expected, answer):.1f}")


def print_recipe(opset: int, folder: Path, arguments: tuple[Any, ...], unseen: Tensors, expected: Tensor) -> None:
    """The recipe's row, as far as it came."""
    name = f"ONNX Runtime's recipe, opset {opset}"
    try:
        apart(by_recipe, *arguments)
    except (ValueError, RuntimeError) as error:  # what it says is the result
        print(f"| {name} | does not finish: {type(error).__name__}: {error} | | | |", flush=True)
        return
    try:
        level = f"{sqnr_db(expected, apart(run_recipe, folder / RECIPE, unseen)):.1f}"
    except RuntimeError as error:
        level = f"the simulator fails: {type(error).__name__}"
    print_row(name, folder / RECIPE, level)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a process of its own: QNN's library registers once per process, and may end it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def print_row(name: str, model: Path, level: str) -> None:
    """A row of the table, with the nodes that a compiled model still has beside its contexts."""
    nodes = Counter(node.op_type for node in onnx.load(model).graph.node)
    left = [f"{count} {kind}" for kind, count in nodes.most_common() if kind != "EPContext"]
    said = f"{nodes.total() - nodes['EPContext']} ({', '.join(left)})" if left else "0"
    size = sum(path.stat().st_size for path in model.parent.glob("*.bin")) // 1024
    print(f"| {name} | {said} | {nodes['EPContext']} | {size} | {level} |", flush=True)


if __name__ == "__main__":
    main()
