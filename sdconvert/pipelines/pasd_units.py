"""The units of `PASDPipeline`: everything around its sampling loop.

Two ranges meet here and must not be mixed: the control image is in [0, 1], whatever passes the VAE in [-1, 1].
"""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from sdconvert.errors import UsageError
from sdconvert.pipelines.base import Observer
from sdconvert.pipelines.color import wavelet_color_fix
from sdconvert.pipelines.tiles import TileGrid
from sdconvert.pipelines.unit import Inputs, PipelineUnit

if TYPE_CHECKING:
    from sdconvert.pipelines.pasd import PASDPipeline

_logger = logging.getLogger(__name__)

# Field note of the seed: below this short side a PASD of Stable Diffusion's size gives poor pictures.
MIN_SHORT_SIDE = 768


@dataclass(frozen=True)
class SamplingShape:
    """Sizes of one run, as (height, width).

    Attributes:
        requested: Pixels of the result.
        processed: Pixels that the networks see: `requested`, padded to whole latents and to one tile.
        grid: Tiles over the latents of `processed`.
    """

    requested: tuple[int, int]
    processed: tuple[int, int]
    grid: TileGrid


def sampling_shape(
    height: int, width: int, *, upscale: int, factor: int, latent_tile: int | None, latent_overlap: int | None
) -> SamplingShape:
    """Sizes for a low-resolution picture of `height` x `width` pixels.

    Args:
        height: Height of the low-resolution picture.
        width: Width of the low-resolution picture.
        upscale: Enlargement, at least 1.
        factor: Pixels per latent.
        latent_tile: Side of a tile in latents; None: no tiles.
        latent_overlap: Overlap of tiles in latents; None: 8 as in PASD, at most half a tile.

    Raises:
        UsageError: An enlargement below 1, an overlap without tiles or not below the tile.
    """
    if upscale < 1:
        raise UsageError(f"upscale={upscale} does not enlarge", hint="choose 1 or more")
    if latent_tile is None and latent_overlap is not None:
        raise UsageError(f"latent_overlap={latent_overlap} has no effect without tiles", hint="give latent_tile too")
    if latent_tile is not None and latent_tile < 1:
        raise UsageError(f"latent_tile={latent_tile} is no tile", hint="give the side of the device graph in latents")
    requested = height * upscale, width * upscale
    latents = [max(-(-side // factor), latent_tile or 1) for side in requested]
    overlap = min(8, (latent_tile or 0) // 2) if latent_overlap is None else latent_overlap
    grid = TileGrid.covering(latents[0], latents[1], latent_tile, overlap)
    return SamplingShape(requested, (latents[0] * factor, latents[1] * factor), grid)


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
        _check_image(image)
        shape = sampling_shape(
            *image.shape[1:],
            upscale=upscale,
            factor=pipe.vae_scale_factor,
            latent_tile=latent_tile,
            latent_overlap=latent_overlap,
        )
        sizes = "requested %dx%d, processed %dx%d (height x width, %d pixels per latent), %d tile(s)"
        _logger.info(sizes, *shape.requested, *shape.processed, pipe.vae_scale_factor, len(shape.grid.corners))
        if pipe.stable_diffusion_size and min(shape.requested) < MIN_SHORT_SIDE:
            _logger.warning(
                "a short side of %d pixels gives poor results with this model; use at least %d",
                min(shape.requested),
                MIN_SHORT_SIDE,
            )
        return {"sampling_shape": shape}


def _check_image(image: Tensor) -> None:
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point() or image.numel() == 0:
        raise UsageError(
            f"the image has shape {tuple(image.shape)} and type {image.dtype}",
            hint="give one RGB picture of shape (3, height, width), floating point in [0, 1]",
        )
    low, high = (float(value) for value in image.aminmax())
    if not (low >= 0.0 and high <= 1.0):  # also catches NaN
        raise UsageError(
            f"the image's values lie in [{low:g}, {high:g}]", hint="map them to [0, 1]: divide 8-bit pixels by 255"
        )


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


class PromptEmbedder(PipelineUnit):
    """Encodes the prompt of each side with the CLIP text encoder."""

    def __init__(self) -> None:
        super().__init__(
            separate_cfg=True,
            input_params_posi={"prompt": "prompt"},
            input_params_nega={"prompt": "negative_prompt"},
            output_params=("prompt_embeds",),
            onload_model_names=("text_encoder",),
        )

    def process(self, pipe: "PASDPipeline", prompt: str) -> Inputs:
        """Return `prompt_embeds` (1, tokens, channels): the last hidden state after the final norm."""
        pipe.load_models_to_device(self.onload_model_names)
        length = pipe.text_encoder.config.max_position_embeddings
        tokens = pipe.tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        used = len(pipe.tokenizer(prompt).input_ids)
        if used > length:
            _logger.warning("the prompt has %d tokens; the text encoder reads the first %d", used, length)
        embeds = pipe.text_encoder(tokens.input_ids.to(pipe.device))[0]
        return {"prompt_embeds": embeds.to(pipe.torch_dtype)}


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
            output_params=("posterior_noise", "noise", "added_noise"),
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

        noise = {"posterior_noise": draw(), "noise": draw()}
        return {**noise, "added_noise": None if added_noise_level is None else draw()}


class LatentsInitializer(PipelineUnit):
    """Starts the sampler from the noised latents of the picture, not from noise alone."""

    def __init__(self) -> None:
        super().__init__(
            input_params=(
                "init_image",
                "posterior_noise",
                "noise",
                "added_noise",
                "added_noise_level",
                "scheduler",
            ),
            output_params=("latents",),
            onload_model_names=("vae",),
        )

    def process(
        self,
        pipe: "PASDPipeline",
        init_image: Tensor,
        posterior_noise: Tensor,
        noise: Tensor,
        scheduler: Any,
        added_noise: Tensor | None = None,
        added_noise_level: int | None = None,
    ) -> Inputs:
        """Return `latents` (1, C, h, w): a sample of the VAE's posterior, noised at the first timestep.

        With `added_noise_level` they are noised once more at that timestep.

        Raises:
            UsageError: `added_noise_level` is no timestep of the scheduler.
        """
        pipe.load_models_to_device(self.onload_model_names)
        posterior = pipe.vae.encode(init_image, return_dict=False)[0]
        latents = (posterior.mean + posterior.std * posterior_noise) * pipe.scaling_factor
        latents = add_noise(latents, noise, int(scheduler.timesteps[0]), scheduler.alphas_cumprod)
        if added_noise is not None and added_noise_level is not None:
            latents = add_noise(latents, added_noise, added_noise_level, scheduler.alphas_cumprod)
        return {"latents": latents * scheduler.init_noise_sigma}


def add_noise(latents: Tensor, noise: Tensor, timestep: int, alphas_cumprod: Tensor) -> Tensor:
    """Forward diffusion to `timestep`: `sqrt(ᾱ)·latents + sqrt(1 - ᾱ)·noise` (Ho et al. 2020, eq. 4).

    The schedulers' own `add_noise` is not used: since diffusers 0.21 UniPC's looks the timestep up in the sampling
    schedule and silently takes the last entry for one that is not in it, so that PASD's second noising at 900 happens
    at about 50. Here a timestep means what training meant by it, for every scheduler.

    Raises:
        UsageError: The timestep is not one of the training schedule.
    """
    if not 0 <= timestep < len(alphas_cumprod):
        raise UsageError(f"noise level {timestep} is no timestep", hint=f"choose 0 to {len(alphas_cumprod) - 1}")
    alpha_cumprod = alphas_cumprod[timestep].to(latents)
    return alpha_cumprod.sqrt() * latents + (1.0 - alpha_cumprod).sqrt() * noise


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
        pipe: "PASDPipeline",
        latents: Tensor,
        sampling_shape: SamplingShape,
        scheduler: Any,
        observer: Observer | None = None,
    ) -> Inputs:
        """Return `decoded_image` (1, 3, H, W) in [0, 1], of the requested size."""
        pipe.load_models_to_device(self.onload_model_names)
        grid = sampling_shape.grid

        def decode(index: int) -> Tensor:
            tile = grid.crop(latents, index) / pipe.scaling_factor
            if observer is not None:
                step = len(scheduler.timesteps)
                observer.record("vae_decoder", {"latent_sample": tile}, step=step, side="positive", tile=index)
            return pipe.vae_decoder(tile)

        decoded = grid.blend(map(decode, range(len(grid.corners))), scale=pipe.vae_scale_factor)
        height, width = sampling_shape.requested
        return {"decoded_image": (decoded / 2 + 0.5).clamp(0.0, 1.0)[..., :height, :width]}


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
