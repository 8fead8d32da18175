"""What pipelines from text to picture share: the request that all understand, and the ControlNet that some take."""

from collections.abc import Sequence
from typing import Unpack

from torch import Tensor

from sdconvert.errors import UsageError
from sdconvert.pipelines.latent_diffusion import LatentDiffusionPipeline, SamplingRequest
from sdconvert.pipelines.latent_units import Decoder, check_image
from sdconvert.pipelines.prompt_units import guided_sides
from sdconvert.pipelines.unit import Inputs


class TextToImageRequest(SamplingRequest, total=False):
    """What every request from text to picture may say; all of it may be left out.

    Attributes:
        height: Pixels of the result; None: the control image's, else what the model was trained for.
        width: Likewise.
        negative_prompt: What the picture should not show; needs guidance.
        latents: First noise (1, C, h, w) of unit variance, in place of what the seed gives.
    """

    height: int | None
    width: int | None
    negative_prompt: str | None
    latents: Tensor | None


class ControlledRequest(TextToImageRequest, total=False):
    """What a request may say besides where a ControlNet can take part.

    Attributes:
        control_image: Picture (3, height, width) in [0, 1] for the ControlNet, which must then be loaded.
        conditioning_scale: Weight of the ControlNet's residuals, 1 if not given; needs a control image.
    """

    control_image: Tensor | None
    conditioning_scale: float | None


class TextToImagePipeline(LatentDiffusionPipeline):
    """A pipeline that starts from noise alone; see `LatentDiffusionPipeline` for its arguments."""

    post_unit_classes = (Decoder,)
    default_size: tuple[int, int]
    """Height and width in pixels of a picture whose request names none."""

    def trained_size(self, sample_size: int | Sequence[int]) -> tuple[int, int]:
        """Height and width in pixels that a model was trained for, from its `sample_size` in latents."""
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    def text_to_image_inputs(
        self,
        posi: Inputs,
        nega: Inputs,
        *,
        num_inference_steps: int,
        guidance_scale: float,
        embeds: Sequence[str] = ("prompt_embeds",),
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | None = None,
        latents: Tensor | None = None,
        control_image: Tensor | None = None,
        conditioning_scale: float | None = None,
        **sampling: Unpack[SamplingRequest],
    ) -> tuple[Inputs, Inputs, Inputs]:
        """The three dictionaries of a request; see `guided_sides` and `ControlledRequest` for the arguments.

        Raises:
            UsageError: An argument is out of range, or would have no effect.
        """
        shared = self.common_inputs(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, **sampling)
        shared |= control_inputs(control_image, conditioning_scale)
        default = self.default_size if control_image is None else control_image.shape[-2:]
        shared |= {
            "height": default[0] if height is None else height,
            "width": default[1] if width is None else width,
            "latents": latents,
        }
        return shared, *guided_sides(posi, {"negative_prompt": negative_prompt, **nega}, guidance_scale, embeds=embeds)


def control_inputs(control_image: Tensor | None, conditioning_scale: float | None) -> Inputs:
    """The shared inputs that belong to a ControlNet; none without a control image.

    Raises:
        UsageError: A scale without an image, or an image that is no picture.
    """
    if control_image is None:
        if conditioning_scale is not None:
            raise UsageError(
                f"conditioning_scale={conditioning_scale} has no effect without a control image",
                hint="give control_image too",
            )
        return {}
    check_image(control_image, "control image")
    return {
        "control_image": control_image,
        "conditioning_scale": 1.0 if conditioning_scale is None else conditioning_scale,
    }
