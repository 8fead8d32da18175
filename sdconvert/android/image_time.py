"""What one picture costs, derived from the times of single graphs."""

from collections.abc import Mapping
from typing import Any

from sdconvert.android.manifest import Manifest

CALLS_PER_STEP = ("controlnet", "unet")
"""Graphs that run once in every step of the sampler."""
_ONCE = ("vae_decoder",)


def steps_of(manifest: Manifest) -> int:
    """Return how many steps the bundle's sampler takes; 0 where the manifest does not say."""
    return len(manifest.scheduler.get("timesteps", ()))


def image_time(manifest: Manifest, median_ms: Mapping[str, float]) -> dict[str, Any] | None:
    """Return seconds per picture as `T x (controlnet + unet) + vae_decoder`, or nothing if a part is not known.

    It is a sum, not a measurement: one tile, one call of each graph per step (guidance doubles those), contexts loaded,
    and nothing for what the host does between them.

    Args:
        manifest: Tells the steps of the sampler.
        median_ms: Valid times in milliseconds by graph.
    """
    steps = steps_of(manifest)
    graphs = manifest.models()
    median_ms = dict(median_ms)
    for chain in manifest.chains:
        if median_ms.keys() >= set(chain.parts):
            median_ms[chain.name] = sum(median_ms[part] for part in chain.parts)
    per_step = [name for name in CALLS_PER_STEP if name in graphs]
    once = [name for name in _ONCE if name in graphs]
    if not steps or "unet" not in per_step or not once or not median_ms.keys() >= {*per_step, *once}:
        return None
    seconds = (steps * sum(median_ms[name] for name in per_step) + sum(median_ms[name] for name in once)) / 1e3
    return {"seconds": seconds, "steps": steps, "formula": f"{steps} x ({' + '.join(per_step)}) + {' + '.join(once)}"}
