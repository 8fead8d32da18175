"""The references of the original PASD code: weights, inputs and outputs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdconvert.io.tensors import load_tensors

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class GoldenCase:
    """One recorded run of the original models."""

    folder: Path
    tensors: dict[str, Tensor]

    @property
    def down(self) -> list[Tensor]:
        """The ControlNet's residuals."""
        return [self.tensors[f"controlnet_down_{i}"] for i in range(8)]

    def run_controlnet(self, controlnet: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Run as the references' README does; outputs by their recorded names."""
        with torch.no_grad():
            rgbs, down, mid = controlnet(
                self.tensors["sample"],
                self.tensors["timestep"],
                encoder_hidden_states=self.tensors["encoder_hidden_states"],
                controlnet_cond=self.tensors["controlnet_cond"],
                conditioning_scale=float(self.tensors["conditioning_scale"]),
                **kwargs,
            )
        outputs = {f"controlnet_rgb_{i}": rgb for i, rgb in enumerate(rgbs or [])}
        outputs |= {f"controlnet_down_{i}": residual for i, residual in enumerate(down)}
        return outputs | {"controlnet_mid": mid}

    def run_unet(self, unet: Any, outputs: dict[str, Tensor] | None = None) -> Tensor:
        """Run on the recorded residuals, or on those in `outputs`."""
        residuals = self.tensors if outputs is None else outputs
        with torch.no_grad():
            sample: Tensor = unet(
                self.tensors["sample"],
                self.tensors["timestep"],
                encoder_hidden_states=self.tensors["encoder_hidden_states"],
                down_block_additional_residuals=[residuals[f"controlnet_down_{i}"] for i in range(8)],
                mid_block_additional_residual=residuals["controlnet_mid"],
                return_dict=False,
            )[0]
        return sample


@pytest.fixture
def golden() -> Callable[[str, str], GoldenCase]:
    """Open a recorded case: `golden("pasd_light", "io_extra")`."""

    def open_case(variant: str, case: str = "io") -> GoldenCase:
        return GoldenCase(GOLDEN / variant, load_tensors(GOLDEN / variant / f"{case}.safetensors"))

    return open_case


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """max |x - reference| / max |reference|."""

    def measure(x: Tensor, reference: Tensor) -> float:
        assert x.shape == reference.shape
        return float((x.detach() - reference).abs().max() / reference.abs().max())

    return measure
