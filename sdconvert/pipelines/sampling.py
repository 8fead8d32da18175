"""The recipe's pipeline section as arguments of `PASDPipeline`: the same for every backend that is compared."""

from typing import Any

from sdconvert.config import Recipe


def sampling_arguments(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of a call on a low-resolution picture, in latent tiles of the device graph's size."""
    section = recipe.pipeline
    arguments = section.model_dump()
    if section.guidance_scale == 1.0:
        # Without guidance there is no negative side for the prompt to act on.
        del arguments["negative_prompt"]
    return arguments
