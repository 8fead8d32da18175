"""Static graphs that several folders of tests share: the reference PASD, a smaller one, and single modules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn
from torch.fx import GraphModule

from sdconvert.adapters import ModelAdapter, Tensors, adapter_for
from sdconvert.adapters.spec import GraphSize, IOSpec
from sdconvert.io.tensors import load_tensors
from sdconvert.models.pasd import Variant, build_pasd, load_pasd
from sdconvert.quantize import graph as quantize_graph
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Simulation

GOLDEN = Path(__file__).parent / "golden"
SMALL: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
SMALL_UNET = SMALL | {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
SMALL_CONTROLNET = SMALL | {"conditioning_embedding_out_channels": [4, 4]}


@dataclass(frozen=True)
class Case:
    """A model, one call of it by argument name, and graph inputs to take ranges from."""

    adapter: ModelAdapter
    call: dict[str, Any]
    samples: list[Tensors]

    @torch.no_grad()
    def call_model(self) -> Any:
        """Call the model itself, as a pipeline does."""
        arguments = dict(self.call)
        model: Any = self.adapter.model
        function = model.decode if self.adapter.graph_name == "vae_decoder" else model
        positional = [arguments.pop(name) for name in self.adapter.positional]
        return function(*positional, **arguments, return_dict=False)


def golden_case(graph: str, variant: str = "pasd") -> Case:
    """The reference PASD's `unet` or `controlnet` on its recorded inputs (latents 16x16)."""
    unet, controlnet = load_pasd(GOLDEN / variant)
    recorded = load_tensors(GOLDEN / variant / "io.safetensors")
    call: dict[str, Any] = {name: recorded[name] for name in ("sample", "timestep", "encoder_hidden_states")}
    if graph == "controlnet":
        return _case(controlnet, call | {"controlnet_cond": recorded["controlnet_cond"]})
    down = [recorded[f"controlnet_down_{k}"] for k in range(8)]
    mid = recorded["controlnet_mid"]
    return _case(unet, call | {"down_block_additional_residuals": down, "mid_block_additional_residual": mid})


def small_case(config: Mapping[str, Any] = SMALL_UNET, variant: Variant = "full") -> Case:
    """PASD's UNet with two blocks on latents 8x8: every kind of attention, at 64 and at 16 tokens."""
    torch.manual_seed(0)
    unet, _ = build_pasd(config, SMALL_CONTROLNET, variant)
    _shake(unet)
    shapes = [(1, 8, 8, 8), (1, 8, 8, 8), (1, 8, 4, 4), (1, 16, 4, 4)]
    call = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([601]),
        "encoder_hidden_states": torch.randn(1, 5, 12),
        "down_block_additional_residuals": [torch.randn(shape) for shape in shapes],
        "mid_block_additional_residual": torch.randn(1, 16, 4, 4),
    }
    return _case(unet, call)


def small_controlnet_case() -> Case:
    """PASD's ControlNet for `small_case`: attention over 64 and over 16 tokens, five results."""
    torch.manual_seed(0)
    _, controlnet = build_pasd(SMALL_UNET, SMALL_CONTROLNET)
    _shake(controlnet, zeros=True)
    call = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([601]),
        "encoder_hidden_states": torch.randn(1, 5, 12),
        "controlnet_cond": torch.rand(1, 3, 16, 16),
    }
    return _case(controlnet, call)


def vae_case() -> Case:
    """An autoencoder whose decoder has an attention layer."""
    torch.manual_seed(0)
    vae: AutoencoderKL = AutoencoderKL(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
    )
    return _case(vae.eval(), {"latent_sample": torch.randn(1, 4, 8, 8)})


class ModuleAdapter(ModelAdapter):
    """Covers any module of tensors: its arguments are the graph's inputs, its result the output `y`."""

    graph_name = "module"
    positional = ("x",)

    def pack(self, call: Mapping[str, Any]) -> Tensors:
        return dict(call)

    def unpack(self, outputs: Tensors) -> Tensor:
        return outputs["y"]

    def graph_forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        output: Tensor = self.model(*inputs)
        return (output,)

    def output_names(self, count: int) -> tuple[str, ...]:
        return ("y",)

    def io_spec(self, size: GraphSize | None = None) -> IOSpec:
        raise AssertionError("a bare module has no config that its inputs could follow from")

    def block_paths(self) -> Sequence[str]:
        return ("",)


def module_case(module: nn.Module, *shape: int) -> Case:
    """A module of one input `x` of a shape."""
    generator = torch.Generator().manual_seed(0)
    samples = [{"x": torch.randn(shape, generator=generator)} for _ in range(3)]
    return Case(ModuleAdapter(module.eval()), dict(samples[0]), samples)


def simulate(case: Case, arch: int = 75) -> Simulation:
    """The quantized graph of a case, with ranges, W8A16 as `arch` wants it."""
    simulation = Simulation(case.adapter, case.samples[0], load_settings({arch}))
    simulation.calibrate(case.samples)
    return simulation


@cache
def shared_case(graph: str) -> Case:
    """One case per process of `controlnet` (the reference's), `small_controlnet` and `unet` (small, too).

    Whoever changes it copies.
    """
    if graph == "controlnet":
        return golden_case("controlnet")
    return small_controlnet_case() if graph == "small_controlnet" else small_case()


@cache
def shared_trace(graph: str) -> GraphModule:
    """The traced graph of a shared case, for who only reads it."""
    case = shared_case(graph)
    return quantize_graph.trace(case.adapter, case.samples[0])


@cache
def shared_simulation(graph: str, arch: int = 75) -> Simulation:
    """The simulation of a shared case; whoever changes it makes another."""
    return simulate(shared_case(graph), arch)


def _shake(model: nn.Module, *, zeros: bool = False) -> None:
    """Move norms, which begin as a grid of one value, and layers that begin as zero and hide what is before them."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.GroupNorm | nn.LayerNorm) or (zeros and not all(one.any() for one in own)):
            for parameter in own:
                parameter.data += 0.1 * torch.randn_like(parameter)


def _case(model: nn.Module, call: dict[str, Any]) -> Case:
    adapter = adapter_for(model)
    first = adapter.pack(call)
    generator = torch.Generator().manual_seed(1)
    others = [
        {name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in first.items()}
        for _ in range(2)
    ]
    return Case(adapter, call, [first, *others])
