"""AdaRound on second moments against AIMET's, on one UNet: time, memory, forwards, and what the outputs gain.

python benchmarks/adaround_vs_aimet.py [--seeds 1] [--batches 8] [--iterations 200 1000]

Both round the same 83 weights to the same 4-bit grids, AIMET's, on the same calibration batches. A process of its own
does each run, on one thread; model, data and imports are there before the clock starts. The rounded weights, and with
ours the biases that changed with them, then go into diffusers' own model, exactly as a simulation would round them, and
its output on four batches that no run saw is compared with the floating-point one. Seeds are those of the calibration
data; the model's weights are random.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from sdconvert.adapters import Tensors
from sdconvert.adapters.unet_2d_condition import UNet2DConditionModelAdapter
from sdconvert.memory import PeakMemory
from sdconvert.metrics import sqnr_db
from sdconvert.quantize import graph
from sdconvert.quantize.adaround.code_grid import CodeGrid
from sdconvert.quantize.adaround.run import AdaRoundSettings, adaround
from sdconvert.quantize.adaround.solve import SolverSettings

BITWIDTH = 4
SIDE, BATCH, TOKENS, TEXT = 16, 2, 8, 32
UNSEEN_SEED, UNSEEN = 10_007, 4
METHODS = {"ours coordinate": "coordinate", "ours adaround": "adaround"}


class TupleUNet(nn.Module):
    """A UNet as AIMET's tracers take it: positional inputs, a tensor out.

    Attributes:
        forwards: Times that any copy was run, to its end or not.
    """

    forwards = 0

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """What the UNet returns first."""
        TupleUNet.forwards += 1
        output: Tensor = self.unet(sample, timestep, text, return_dict=False)[0]
        return output


def build_unet() -> UNet2DConditionModel:
    """The UNet, in small what Stable Diffusion's is: 83 convolutions and linear layers, 0.79 million parameters."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        norm_num_groups=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def batches(count: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Latents, a timestep and text, for `count` calls."""
    generator = torch.Generator().manual_seed(seed)

    def one(index: int) -> tuple[Tensor, Tensor, Tensor]:
        sample = torch.randn(BATCH, 4, SIDE, SIDE, generator=generator)
        timestep = torch.tensor(int((index + 0.5) * 1000 / count))
        return sample, timestep, torch.randn(BATCH, TOKENS, TEXT, generator=generator)

    return [one(index) for index in range(count)]


class GraphInputs(Sequence[Tensors]):
    """The same calls as inputs of the static graph."""

    def __init__(self, adapter: Any, calls: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        self._adapter, self._calls = adapter, calls

    def __len__(self) -> int:
        return len(self._calls)

    def __getitem__(self, index: Any) -> Any:
        sample, timestep, text = self._calls[index]
        return self._adapter.pack({"sample": sample, "timestep": timestep, "encoder_hidden_states": text})

    def __iter__(self) -> Iterator[Tensors]:
        return (self[index] for index in range(len(self)))


def run_aimet(folder: Path, seed: int, count: int, iterations: int) -> dict[str, float]:
    """AIMET's AdaRound; its weights and encodings go into the folder."""
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
    from aimet_torch.nn import QuantizationMixin
    from diffusers.models.embeddings import Timesteps

    QuantizationMixin.ignore(Timesteps)
    model, calls = TupleUNet(build_unet()), batches(count, seed)
    # With the rest it would quantize weights of norms to four bits, and lose half a decibel.
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm | nn.LayerNorm)]
    parameters = AdaroundParameters(
        cast(Any, calls), count, default_num_iterations=iterations, forward_fn=lambda m, call: m(*call)
    )
    torch.manual_seed(seed)
    memory, start = PeakMemory(), time.perf_counter()
    before, cpu = memory.peak_bytes(), time.process_time()
    rounded = Adaround.apply_adaround(
        model, calls[0], parameters, str(folder), "aimet", default_param_bw=BITWIDTH, ignore_quant_ops_list=norms
    )
    figures = measured(memory, before, cpu, start) | {"forwards": TupleUNet.forwards}
    torch.save({f"{name}": tensor for name, tensor in rounded.unet.state_dict().items()}, folder / "weights.pt")
    return figures


def run_ours(folder: Path, seed: int, count: int, method: Literal["adaround", "coordinate"]) -> dict[str, float]:
    """Ours, on AIMET's grids; weights go into the folder."""
    model = build_unet()
    adapter = UNet2DConditionModelAdapter(model)
    samples = GraphInputs(adapter, batches(count, seed))
    grids = read_grids(folder.parent, model)
    memory, start = PeakMemory(), time.perf_counter()
    before, cpu = memory.peak_bytes(), time.process_time()
    traced = graph.trace(adapter, samples[0])
    settings = AdaRoundSettings(solver=SolverSettings(method))
    result = adaround(traced, samples, grids, settings, folder / "adaround")
    weights = {**dict(result.weights()), **result.biases()}
    figures = measured(memory, before, cpu, start) | {"forwards": result.forwards}
    torch.save(weights, folder / "weights.pt")
    return figures


def measured(memory: PeakMemory, before: int, cpu: float, start: float) -> dict[str, float]:
    """What a stretch took."""
    return {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - start,
        "rss_mib": (memory.peak_bytes() - before) / 2**20,
    }


def read_grids(folder: Path, model: nn.Module) -> dict[str, CodeGrid]:
    """AIMET's grids of all weights."""
    entries = json.loads((folder / "scales" / "aimet.encodings").read_text())
    entries = entries.get("param_encodings", entries)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return {
        name.removeprefix("unet."): CodeGrid.from_encodings(found, shapes[name.removeprefix("unet.")])
        for name, found in entries.items()
    }


@torch.no_grad()
def output_sqnr(folder: Path) -> float:
    """SQNR in dB of the UNet's output, with the folder's weights (none: the model's own) rounded to the grids."""
    model, calls = build_unet(), batches(UNSEEN, UNSEEN_SEED)
    reference = torch.stack([TupleUNet(model)(*call) for call in calls])
    path = folder / "weights.pt"
    weights = {**model.state_dict(), **(torch.load(path) if path.exists() else {})}
    for name, grid in read_grids(folder.parent, model).items():
        matrix = weights[name].flatten(1)
        weights[name] = grid.dequantize(grid.nearest(matrix)).reshape(weights[name].shape)
    model.load_state_dict(weights)
    return sqnr_db(reference, torch.stack([TupleUNet(model)(*call) for call in calls]))


def one(what: str, folder: Path, seed: int, count: int, iterations: int) -> dict[str, float]:
    """One run, and what became of the output."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder.mkdir()
    with redirect_stdout(sys.stderr):
        if what == "aimet":
            figures = run_aimet(folder, seed, count, iterations)
        elif what in METHODS:
            figures = run_ours(folder, seed, count, cast(Any, METHODS[what]))
        else:
            figures = {}
        return {**figures, "sqnr_db": output_sqnr(folder)}


def measure(root: Path, name: str, what: str, *numbers: int) -> dict[str, float]:
    """`one` in a process of its own."""
    command = [sys.executable, __file__, "--one", what, str(root / name), *map(str, numbers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def table(label: str, runs: list[dict[str, float]]) -> str:
    """A line of means; SQNR with smallest and largest where there are several."""

    def mean(key: str) -> float:
        return statistics.fmean(run[key] for run in runs)

    levels = [run["sqnr_db"] for run in runs]
    spread = f" ({min(levels):.2f} to {max(levels):.2f})" if len(levels) > 1 else ""
    if "cpu_s" not in runs[0]:
        return f"{label:30s}{'':42s}{mean('sqnr_db'):9.2f}"
    return (
        f"{label:30s}{mean('cpu_s'):9.1f} {mean('wall_s'):9.1f} {mean('rss_mib'):13.0f} {mean('forwards'):8.0f}"
        f"{mean('sqnr_db'):9.2f}{spread}"
    )


def main() -> None:
    """Alternate the runs and print means over the seeds."""
    parser = argparse.ArgumentParser(description="Compare AdaRound on second moments with AIMET's.")
    parser.add_argument("--seeds", type=int, default=1, help="calibration sets (default: 1)")
    parser.add_argument("--batches", type=int, nargs="+", default=[8], help="calibration batches of two (default: 8)")
    parser.add_argument("--iterations", type=int, nargs="*", default=[200, 1000], help="AIMET's (default: 200 1000)")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        what, folder, *numbers = arguments.one
        print(json.dumps(one(what, Path(folder), *map(int, numbers))))
        return
    print(f"{platform.machine()}, 1 of {os.cpu_count()} cores, Python {platform.python_version()}, ", end="")
    print(f"torch {version('torch')}, aimet-torch {version('aimet-torch')}, load {os.getloadavg()[0]:.1f}")
    heads = f"{'CPU s':>9s} {'wall s':>9s} {'peak RSS MiB':>13s} {'forwards':>8s} {'SQNR dB':>8s}"
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        measure(root, "scales", "aimet", 0, 1, 1)
        nearest = measure(root, "nearest", "nearest", 0, 0, 0)
        for count in arguments.batches:
            runs: dict[str, list[dict[str, float]]] = defaultdict(list)
            for seed in range(arguments.seeds):
                for iterations in arguments.iterations:
                    name = f"aimet-{count}-{seed}-{iterations}"
                    found = measure(root, name, "aimet", seed, count, iterations)
                    runs[f"AIMET, {iterations} iterations"].append(found)
                for what in METHODS:
                    runs[what].append(measure(root, f"{what}-{count}-{seed}", what, seed, count, 0))
            print(f"{f'{count} batches of {BATCH}, {arguments.seeds} seeds':30s}{heads}")
            print(table("nearest", [nearest]))
            for label, found_runs in runs.items():
                print(table(label, found_runs), flush=True)


if __name__ == "__main__":
    main()
