"""What a plugin costs: PASD's UNet through its plugin, against the same modules called inline.

python benchmarks/plugins.py [--rounds 60]
"""

import argparse
import os
import platform
import statistics
import time
from copy import deepcopy
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from sdconvert import load_pasd
from sdconvert.assets import asset_path
from sdconvert.models.pixel_attention import PixelAttentionPlugin


class Inline(nn.Module):
    """A layer of an up block with its pixel transformer called after it, without a hook."""

    def __init__(self, layer: nn.Module, transformer: nn.Module, residuals: list[Tensor], residual: int) -> None:
        super().__init__()
        self.layer, self.transformer = layer, transformer
        self.residuals, self.residual = residuals, residual

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer, then the attention to the pixels."""
        output = self.layer(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        pixels = self.residuals[self.residual].flatten(2).transpose(1, 2)
        (hidden,) = self.transformer(hidden, encoder_hidden_states=pixels, return_dict=False)
        return (hidden,) if isinstance(output, tuple) else hidden


def inline(unet: Any, residuals: list[Tensor]) -> Any:
    """A copy of `unet` that calls its pixel transformers inline; `residuals` is read at each call."""
    unet = deepcopy(unet)
    plugin = next(module for module in unet.modules() if isinstance(module, PixelAttentionPlugin))
    steps = plugin.steps
    transformers = [unet.up_blocks[step.block].pixel_attentions[step.layer] for step in steps]
    plugin.remove()
    for step, transformer in zip(steps, transformers, strict=True):
        block = unet.up_blocks[step.block]
        layers = block.attentions if step.has_text else block.resnets
        layers[step.layer] = Inline(layers[step.layer], transformer, residuals, step.residual)
    return unet


@torch.no_grad()
def main() -> None:
    """Alternate the two and print the medians."""
    parser = argparse.ArgumentParser(description="Measure the cost of PASD's plugin.")
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{platform.machine()}, 1 of {os.cpu_count()} cores, Python {platform.python_version()}, ", end="")
    print(f"torch {version('torch')}, diffusers {version('diffusers')}")
    unet, controlnet = load_pasd(asset_path("pasd_tiny"))
    sample, timestep, text = torch.randn(1, 8, 32, 32), torch.tensor([999]), torch.randn(1, 77, 64)
    control = torch.rand(1, 3, 128, 128)
    *_, down, mid = controlnet(sample, timestep, encoder_hidden_states=text, controlnet_cond=control, return_dict=False)
    call = {
        "encoder_hidden_states": text,
        "down_block_additional_residuals": down,
        "mid_block_additional_residual": mid,
        "return_dict": False,
    }
    models = {"plugin": unet.eval(), "inline": inline(unet, list(down)).eval()}
    outputs = [model(sample, timestep, **call)[0] for model in models.values()]
    if not torch.equal(*outputs):
        raise SystemExit("the two do not compute the same")
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for index in range(rounds):
        for name in sorted(models, reverse=bool(index % 2)):
            start = time.perf_counter()
            models[name](sample, timestep, **call)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:8} {1e3 * median:8.2f} ms, median of {rounds}")
    print(f"overhead {100 * (medians['plugin'] / medians['inline'] - 1):.1f} %")


if __name__ == "__main__":
    main()
