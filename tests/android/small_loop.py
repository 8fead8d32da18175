"""What the tests of the loop sample: two pictures on small latents."""

from typing import Any

SMALL: dict[str, Any] = {
    "prompt": "clean",
    "conditioning_scale": 1.0,
    "seed": 1,
    "upscale": 4,
    "latent_tile": 8,
    "latent_overlap": 4,
    "color_fix": True,
}
NAMES = ("chelsea-tile", "china-tile")
