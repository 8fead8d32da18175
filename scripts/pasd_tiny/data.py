"""The training photographs and the random crops that the stages draw from them.

The photographs come from the installed scikit-image and scikit-learn wheels. Those without a stated licence are left
out, and so are `chelsea` and `china`, on which the model is judged.
"""

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from sdconvert.io.degradation import FACTOR, degrade, enlarge
from sdconvert.io.images import read_image

ADDED_PROMPT = ", clean, high-resolution, 8k"
_MARGIN = 32  # pixels around a crop, so that its low-resolution picture has neighbours as inside a whole picture


@dataclass(frozen=True)
class Photograph:
    """One training photograph."""

    file: str
    """Path inside the wheel, from site-packages."""
    caption: str
    weight: float
    """How often it is drawn, relative to the others."""


PHOTOGRAPHS = (
    Photograph(
        "skimage/data/astronaut.png",
        "a photo of a smiling astronaut in an orange suit, flag and shuttle",
        3,
    ),
    Photograph(
        "skimage/data/coffee.png",
        "a photo of a cup of coffee with a spoon on a wooden table",
        3,
    ),
    Photograph("skimage/data/rocket.jpg", "a photo of a rocket on the launch pad at night", 3),
    Photograph(
        "sklearn/datasets/images/flower.jpg",
        "a photo of a pink flower, dahlia, green leaves",
        3,
    ),
    Photograph("skimage/data/camera.png", "a photo of a man with a camera, buildings, grass", 3),
    Photograph("skimage/data/brick.png", "a photo of a brick wall", 1.5),
    Photograph("skimage/data/grass.png", "a photo of straw and grass", 1.5),
    Photograph("skimage/data/gravel.png", "a photo of gravel stones", 1.5),
    Photograph("skimage/data/coins.png", "a photo of old coins", 1),
    Photograph("skimage/data/text.png", "a photo of handwritten text on paper", 0.5),
    Photograph("skimage/data/hubble_deep_field.jpg", "galaxies and stars in the night sky", 1),
    Photograph("skimage/data/ihc.png", "microscope image of tissue", 1),
    Photograph("skimage/data/retina.jpg", "a photo of a retina", 0.5),
)


def wheel_file(file: str) -> Path:
    """Where a file of an installed package lies, without importing the package."""
    package, _, inside = file.partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed. hint: install the dev dependencies, they hold the photographs.")
    return Path(spec.origin).parent / inside


@dataclass
class Batch:
    """Crops with what the degradation leaves of them."""

    full: Tensor
    """Full-resolution crops, (N, 3, S, S) in [0, 1]."""
    control: Tensor
    """The same crops degraded and enlarged, (N, 3, S, S) in [0, 1]."""
    captions: list[str]


class Crops:
    """Endless random crops: position, scale 1 to 2.5, flips, quarter turns, colour jitter.

    Args:
        generator: Source of all randomness, saved with the checkpoints.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.pictures = [read_image(wheel_file(photograph.file)) for photograph in PHOTOGRAPHS]
        self.weights = torch.tensor([photograph.weight for photograph in PHOTOGRAPHS])

    def clean(self, count: int, size: int) -> tuple[Tensor, list[str]]:
        """Draw `count` crops, (count, 3, size, size) in [0, 1], and their captions."""
        picks = torch.multinomial(self.weights, count, replacement=True, generator=self.generator).tolist()
        return torch.stack([self._crop(self.pictures[i], size) for i in picks]), [PHOTOGRAPHS[i].caption for i in picks]

    def degraded(self, count: int, size: int, caption_dropout: float = 0.5) -> Batch:
        """Draw crops with their control images; captions with the added prompt, or empty for the dropped ones."""
        wide, captions = self.clean(count, size + _MARGIN)
        top, left = (int(self._integer(0, _MARGIN // FACTOR)) * FACTOR for _ in range(2))
        controls = torch.stack([enlarge(degrade(image, self._integer(0, 2**31 - 1))) for image in wide])
        window = (..., slice(top, top + size), slice(left, left + size))
        kept = [caption + ADDED_PROMPT if self._uniform() > caption_dropout else "" for caption in captions]
        return Batch(wide[window].contiguous(), controls[window].contiguous(), kept)

    def _integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def _uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def _crop(self, picture: Tensor, size: int) -> Tensor:
        largest = min(2.5, min(picture.shape[1:]) / size)
        scale = 1.0 if self._uniform() < 0.4 else self._uniform(1.0, largest)
        side = round(size * scale)
        top, left = (
            self._integer(0, picture.shape[1] - side),
            self._integer(0, picture.shape[2] - side),
        )
        crop = picture[:, top : top + side, left : left + side]
        if side != size:
            crop = functional.interpolate(crop[None], (size, size), mode="bicubic", antialias=True)[0]
        crop = torch.rot90(crop, self._integer(0, 3), (1, 2))
        crop = crop.flip(2) if self._uniform() < 0.5 else crop
        return self._jitter(crop).clamp(0, 1)

    def _jitter(self, crop: Tensor) -> Tensor:
        if self._uniform() < 0.5:
            return crop
        if self._uniform() < 0.5:
            crop = turn_hue(crop, self._uniform(-math.pi, math.pi), self._uniform(0.7, 1.5))
        gain = self._uniform(0.8, 1.15) + 0.12 * (torch.rand(3, 1, 1, generator=self.generator) - 0.5)
        return crop * gain + self._uniform(-0.08, 0.08)


def turn_hue(image: Tensor, angle: float, saturation: float) -> Tensor:
    """Turn the colours of an image (3, H, W) about the grey axis by `angle` radians and stretch them from it.

    The photographs are mostly brown, orange and blue; without this an autoencoder forgets that green exists.
    """
    grey = image.mean(0, keepdim=True)
    colour = image - grey
    # The cross product with the unit grey axis is the quarter turn.
    quarter = (colour.roll(1, 0) - colour.roll(-1, 0)) / math.sqrt(3)
    return grey + saturation * (math.cos(angle) * colour + math.sin(angle) * quarter)
