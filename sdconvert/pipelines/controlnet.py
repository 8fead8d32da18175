"""Stable Diffusion under a ControlNet: as `stable_diffusion.py`, with a control image that every run needs."""

from typing import Any, Unpack

from torch import Tensor

from sdconvert.pipelines.latent_diffusion import LatentDiffusionParts
from sdconvert.pipelines.latent_units import check_image
from sdconvert.pipelines.stable_diffusion import StableDiffusionPipeline
from sdconvert.pipelines.unit import Inputs


class StableDiffusionControlNetPipeline(StableDiffusionPipeline):
    """Makes a picture from text and a control image.

    Args:
        unet: UNet.
        controlnet: ControlNet.
        **parts: As `LatentDiffusionPipeline` takes them.
    """

    def __init__(self, *, unet: Any, controlnet: Any, **parts: Unpack[LatentDiffusionParts]) -> None:
        super().__init__(unet=unet, controlnet=controlnet, **parts)

    def inputs(
        self, prompt: str | None = None, *, control_image: Tensor | None = None, **arguments: Any
    ) -> tuple[Inputs, Inputs, Inputs]:
        """Inputs of a run.

        Args:
            prompt: What the picture shows.
            control_image: Picture (3, height, width) in [0, 1]; required, and its size is the result's.
            **arguments: As `StableDiffusionPipeline.inputs` takes them.

        Raises:
            UsageError: No control image, or as `StableDiffusionPipeline.inputs`.
        """
        check_image(control_image, "control image")
        return super().inputs(prompt, control_image=control_image, **arguments)
