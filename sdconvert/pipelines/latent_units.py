"""Units around the latents that several pipelines share: sizes, first noise, control image, decoding."""

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from sdconvert.errors import UsageError
from sdconvert.pipelines.base import Observer
from sdconvert.pipelines.shape import SamplingShape
from sdconvert.pipelines.unit import Inputs, PipelineUnit

if TYPE_CHECKING:
    from sdconvert.pipelines.latent_diffusion import LatentDiffusionPipeline

_logger = logging.getLogger(__name__)


def check_image(image: Any, name: str = "image") -> None:
    """Refuse what is no RGB picture (3, h, w) in [0, 1].

    Raises:
        UsageError: Says what was found.
    """
    if not isinstance(image, Tensor):
        raise UsageError(
            f"the {name} is {'missing' if image is None else f'a {type(image).__name__}'}",
            hint="give one RGB picture as a tensor of shape (3, height, width), floating point in [0, 1]",
        )
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point() or image.numel() == 0:
        raise UsageError(
            f"the {name} has shape {tuple(image.shape)} and type {image.dtype}",
            hint="give one RGB picture of shape (3, height, width), floating point in [0, 1]",
        )
    low, high = (float(value) for value in image.aminmax())
    if not (low >= 0.0 and high <= 1.0):  # also catches NaN
        raise UsageError(
            f"the {name}'s values lie in [{low:g}, {high:g}]", hint="map them to [0, 1]: divide 8-bit pixels by 255"
        )


def log_shape(shape: SamplingShape, factor: int) -> None:
    """Tell both sizes of a run."""
    sizes = "requested %dx%d, processed %dx%d (height x width, %d pixels per latent), %d tile(s)"
    _logger.info(sizes, *shape.requested, *shape.processed, factor, len(shape.grid.corners))


class SizeChecker(PipelineUnit):
    """Settles all sizes of a picture that is made from text."""

    def __init__(self) -> None:
        super().__init__(
            input_params=("height", "width", "latent_tile", "latent_overlap"), output_params=("sampling_shape",)
        )

    def process(
        self,
        pipe: "LatentDiffusionPipeline",
        height: int,
        width: int,
        latent_tile: int | None = None,
        latent_overlap: int | None = None,
    ) -> Inputs:
        """Return `sampling_shape`; see `LatentDiffusionPipeline.sampling_shape`."""
        shape = pipe.sampling_shape(height, width, latent_tile=latent_tile, latent_overlap=latent_overlap)
        log_shape(shape, pipe.vae_scale_factor)
        return {"sampling_shape": shape}


class InitialNoise(PipelineUnit):
    """Starts the sampler from noise alone."""

    def __init__(self) -> None:
        super().__init__(
            input_params=("sampling_shape", "generator", "scheduler", "latents"),
            output_params=("latents", "generator"),
        )

    def process(
        self,
        pipe: "LatentDiffusionPipeline",
        sampling_shape: SamplingShape,
        generator: torch.Generator,
        scheduler: Any,
        latents: Tensor | None = None,
    ) -> Inputs:
        """Return `latents` (1, C, h, w): those given or drawn, times the standard deviation that the sampler wants.

        Raises:
            UsageError: The given latents have another shape.
        """
        shape = (1, pipe.latent_channels, sampling_shape.grid.height, sampling_shape.grid.width)
        if latents is None:
            latents = torch.randn(shape, generator=generator)
        elif tuple(latents.shape) != shape:
            raise UsageError(
                f"the latents have shape {tuple(latents.shape)}, not {shape}", hint="give the size they belong to"
            )
        latents = latents.to(pipe.device, pipe.torch_dtype)
        return {"latents": latents * scheduler.init_noise_sigma, "generator": generator}


class ControlImagePreprocessor(PipelineUnit):
    """Gives a ControlNet its picture; does nothing, and needs nothing, without one."""

    def __init__(self) -> None:
        super().__init__(
            input_params=("control_image", "sampling_shape"),
            output_params=("control_image",),
            trigger_params=("control_image",),
        )

    def process(self, pipe: "LatentDiffusionPipeline", control_image: Tensor, sampling_shape: SamplingShape) -> Inputs:
        """Return `control_image` (1, 3, H, W) in [0, 1], padded to the processed size by repeating its border.

        Raises:
            UsageError: It is no picture, or not of the requested size.
        """
        check_image(control_image, "control image")
        (height, width), (full_height, full_width) = sampling_shape.requested, sampling_shape.processed
        if tuple(control_image.shape[1:]) != (height, width):
            raise UsageError(
                f"the control image has {control_image.shape[1]}x{control_image.shape[2]} pixels (height x width), "
                f"the picture {height}x{width}",
                hint="resize the control image, or leave out height and width",
            )
        batch = control_image[None].to(pipe.device, pipe.torch_dtype)
        padding = (0, full_width - width, 0, full_height - height)
        return {"control_image": functional.pad(batch, padding, mode="replicate")}


class Decoder(PipelineUnit):
    """Decodes the latents, tile by tile, and cuts the padding off."""

    def __init__(self) -> None:
        super().__init__(
            input_params=("latents", "sampling_shape", "scheduler", "observer"),
            output_params=("decoded_image",),
            onload_model_names=("vae_decoder",),
        )

    def process(
        self,
        pipe: "LatentDiffusionPipeline",
        latents: Tensor,
        sampling_shape: SamplingShape,
        scheduler: Any,
        observer: Observer | None = None,
    ) -> Inputs:
        """Return `decoded_image` (1, 3, H, W) in [0, 1], of the requested size."""
        pipe.load_models_to_device(self.onload_model_names)
        grid = sampling_shape.grid

        def decode(index: int) -> Tensor:
            tile = pipe.unscale_latents(grid.crop(latents, index))
            if observer is not None:
                step = len(scheduler.timesteps)
                observer.record("vae_decoder", {"latent_sample": tile}, step=step, side="positive", tile=index)
            return pipe.vae_decoder(tile)

        decoded = grid.blend(pipe.each(decode, range(len(grid.corners))), scale=pipe.vae_scale_factor)
        height, width = sampling_shape.requested
        return {"decoded_image": (decoded / 2 + 0.5).clamp(0.0, 1.0)[..., :height, :width]}
