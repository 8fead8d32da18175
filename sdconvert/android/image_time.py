"""What one picture costs, derived from the times of single graphs."""

from collections.abc import Mapping
from typing import Any

from sdconvert.android.manifest import Manifest

_PER_STEP = ("controlnet", "unet")
_ONCE = ("vae_decoder",)


def calls_per_picture(manifest: Manifest, graph: str) -> int:
    """Return how often a graph runs for a picture of one tile: once, or in every step of the sampler."""
    looped = {part for model in _PER_STEP for part in manifest.parts_of(model)}
    return max(1, _steps(manifest)) if graph in looped else 1


def image_time(manifest: Manifest, median_ms: Mapping[str, float]) -> dict[str, Any] | None:
    """Return seconds per picture as `T x (controlnet + unet) + vae_decoder`, or nothing if a part is not known.

    It is a sum, not a measurement: one tile, one call of each graph per step (guidance doubles those), contexts loaded,
    and nothing for what the host does between them.

    Args:
        manifest: Tells the steps of the sampler.
        median_ms: Valid times in milliseconds by graph.
    """
    steps, models = _steps(manifest), manifest.models()
    per_step = [name for name in _PER_STEP if name in models]
    once = [name for name in _ONCE if name in models]
    looped, single = ([part for name in names for part in manifest.parts_of(name)] for names in (per_step, once))
    if not steps or "unet" not in per_step or not once or not median_ms.keys() >= {*looped, *single}:
        return None
    seconds = (steps * sum(median_ms[part] for part in looped) + sum(median_ms[part] for part in single)) / 1e3
    return {"seconds": seconds, "steps": steps, "formula": f"{steps} x ({' + '.join(per_step)}) + {' + '.join(once)}"}


def _steps(manifest: Manifest) -> int:
    return len(manifest.scheduler.get("timesteps", ()))
