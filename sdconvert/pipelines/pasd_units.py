"""The units of `PASDPipeline`: everything around its sampling loop.

Two ranges meet here and must not be mixed: the control image is in [0, 1], whatever passes the VAE in [-1, 1].
"""

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from sdconvert.adapters.schedulers import noisings_of, start_from
from sdconvert.pipelines.base import Observer
from sdconvert.pipelines.color import wavelet_color_fix
from sdconvert.pipelines.latent_units import check_image, log_shape
from sdconvert.pipelines.shape import SamplingShape
from sdconvert.pipelines.unit import Inputs, PipelineUnit

if TYPE_CHECKING:
    from sdconvert.pipelines.pasd import PASDPipeline

_logger = logging.getLogger(__name__)


class ShapeChecker(PipelineUnit):
    """Checks the picture and settles all sizes."""

    def __init__(self) -> None:
        super().__init__(
            input_params=("image", "upscale", "latent_tile", "latent_overlap"), output_params=("sampling_shape",)
        )

    def process(
        self,
        pipe: "PASDPipeline",
        image: Tensor,
        upscale: int,
        latent_tile: int | None = None,
        latent_overlap: int | None = None,
    ) -> Inputs:
        """Return `sampling_shape`; warns if the short side is too small for a model of Stable Diffusion's size."""
        check_image(image)
        shape = pipe.sampling_shape(
            *image.shape[1:], upscale=upscale, latent_tile=latent_tile, latent_overlap=latent_overlap
        )
        log_shape(shape, pipe.vae_scale_factor)
        if warning := pipe.size_warning(shape):
            _logger.warning(warning)
        return {"sampling_shape": shape}


class ImagePreprocessor(PipelineUnit):
    """Enlarges the picture and pads it to the processed size.

    PASD resizes to whole latents and back; padding keeps the pixel grid, so nothing is resampled twice.
    """

    def __init__(self) -> None:
        super().__init__(input_params=("image", "sampling_shape"), output_params=("upsampled_image",))

    def process(self, pipe: "PASDPipeline", image: Tensor, sampling_shape: SamplingShape) -> Inputs:
        """Return `upsampled_image` (1, 3, H, W) in [0, 1], enlarged with PIL's bicubic kernel."""
        batch = image[None].to(pipe.device, pipe.torch_dtype)
        (height, width), (full_height, full_width) = sampling_shape.requested, sampling_shape.processed
        # antialias selects Keys' kernel with a = -0.5, which is PIL's; without it torch uses -0.75.
        enlarged = functional.interpolate(batch, (height, width), mode="bicubic", antialias=True).clamp(0.0, 1.0)
        padding = (0, full_width - width, 0, full_height - height)
        return {"upsampled_image": functional.pad(enlarged, padding, mode="replicate")}


class ControlImageEncoder(PipelineUnit):
    """Gives the two networks the picture, each in its own range."""

    def __init__(self) -> None:
        super().__init__(input_params=("upsampled_image",), output_params=("control_image", "init_image"))

    def process(self, pipe: "PASDPipeline", upsampled_image: Tensor) -> Inputs:
        """Return `control_image` in [0, 1] for the ControlNet and `init_image` in [-1, 1] for the VAE and UNet."""
        return {"control_image": upsampled_image, "init_image": 2.0 * upsampled_image - 1.0}


class NoiseInitializer(PipelineUnit):
    """Draws all noise of a run from one seed, on the CPU, in PASD's order."""

    def __init__(self) -> None:
        super().__init__(
            input_params=("sampling_shape", "generator", "added_noise_level"),
            # Drawing changes the generator: whoever draws later must come after this.
            output_params=("posterior_noise", "noise", "added_noise", "generator"),
        )

    def process(
        self,
        pipe: "PASDPipeline",
        sampling_shape: SamplingShape,
        generator: torch.Generator,
        added_noise_level: int | None = None,
    ) -> Inputs:
        """Return noise for the VAE's posterior and for the one or two noisings, each (1, C, h, w)."""
        shape = (1, pipe.latent_channels, sampling_shape.grid.height, sampling_shape.grid.width)

        def draw() -> Tensor:
            return torch.randn(shape, generator=generator).to(pipe.device, pipe.torch_dtype)

        noise: Inputs = {"posterior_noise": draw(), "noise": draw()}
        noise["added_noise"] = None if added_noise_level is None else draw()
        return {**noise, "generator": generator}


class LatentsInitializer(PipelineUnit):
    """Starts the sampler from the noised latents of the picture, not from noise alone."""

    def __init__(self) -> None:
        super().__init__(
            input_params=(
                "init_image",
                "sampling_shape",
                "posterior_noise",
                "noise",
                "added_noise",
                "added_noise_level",
                "scheduler",
                "observer",
            ),
            output_params=("latents",),
            onload_model_names=("vae_encoder",),
        )

    def process(
        self,
        pipe: "PASDPipeline",
        init_image: Tensor,
        sampling_shape: SamplingShape,
        posterior_noise: Tensor,
        noise: Tensor,
        scheduler: Any,
        added_noise: Tensor | None = None,
        added_noise_level: int | None = None,
        observer: Observer | None = None,
    ) -> Inputs:
        """Return `latents` (1, C, h, w): a sample of the VAE's posterior, noised to where the sampler begins.

        The picture is encoded tile by tile. With `added_noise_level` latents are noised once more at that timestep.

        Raises:
            UnsupportedSchedulerError: The scheduler's class is unknown.
            UsageError: `added_noise_level` is no timestep of the scheduler.
        """
        pipe.load_models_to_device(self.onload_model_names)
        grid = sampling_shape.grid

        def encode(index: int) -> Tensor:
            tile = grid.crop(init_image, index, pipe.vae_scale_factor)
            if observer is not None:
                observer.record("vae_encoder", {"sample": tile}, step=0, side="positive", tile=index)
            return pipe.vae_encoder(tile)

        mean, log_variance = grid.blend(pipe.each(encode, range(len(grid.corners)))).chunk(2, dim=1)
        # The bounds are those of diffusers' DiagonalGaussianDistribution.
        deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        latents = (mean + deviation * posterior_noise) * pipe.scaling_factor
        # Not times `init_noise_sigma`, as text to picture starts (`InitialNoise`, diffusers' own way): that is meant
        # for noise alone, and leaves a picture 0.2 % short of signal with Euler's trailing and linear spacing. A device
        # that replays the sampler's table starts from the same numbers.
        noisings = noisings_of(scheduler, added_noise_level=added_noise_level)
        noises = [noise] if added_noise is None else [noise, added_noise]
        return {"latents": start_from(noisings, latents, noises)}


class ColorFix(PipelineUnit):
    """Puts the colours of the enlarged input under the detail of the result, if asked to."""

    def __init__(self) -> None:
        super().__init__(
            input_params=("decoded_image", "upsampled_image", "color_fix"), output_params=("output_image",)
        )

    def process(
        self, pipe: "PASDPipeline", decoded_image: Tensor, upsampled_image: Tensor, color_fix: bool = False
    ) -> Inputs:
        """Return `output_image` (1, 3, H, W) in [0, 1]."""
        if not color_fix:
            return {"output_image": decoded_image}
        height, width = decoded_image.shape[-2:]
        return {"output_image": wavelet_color_fix(decoded_image, upsampled_image[..., :height, :width])}
