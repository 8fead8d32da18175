"""Which of our pipelines runs what: keyed by diffusers' class of the same name, as a `model_index.json` names it."""

import diffusers

from sdconvert.config import did_you_mean
from sdconvert.errors import UsageError
from sdconvert.pipelines.base import BasePipeline
from sdconvert.pipelines.controlnet import StableDiffusionControlNetPipeline
from sdconvert.pipelines.pasd import PASDPipeline
from sdconvert.pipelines.pixart_alpha import PixArtAlphaPipeline
from sdconvert.pipelines.stable_diffusion import StableDiffusionPipeline
from sdconvert.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline
from sdconvert.registry import ClassRegistry

PipelineRegistry: ClassRegistry[type[BasePipeline]] = ClassRegistry("pipeline", BasePipeline)

# diffusers has no pipeline of PASD, so ours stands for itself.
PipelineRegistry.register(PASDPipeline)(PASDPipeline)
PipelineRegistry.register(diffusers.StableDiffusionPipeline)(StableDiffusionPipeline)
PipelineRegistry.register(diffusers.StableDiffusionControlNetPipeline)(StableDiffusionControlNetPipeline)
PipelineRegistry.register(diffusers.StableDiffusionXLPipeline)(StableDiffusionXLPipeline)
PipelineRegistry.register(diffusers.PixArtAlphaPipeline)(PixArtAlphaPipeline)


def pipeline_class(name: str) -> type[BasePipeline]:
    """Our pipeline for a class name.

    Args:
        name: As `_class_name` of a `model_index.json` says it.

    Raises:
        UsageError: No pipeline of this name is registered.
    """
    known = {origin.__name__: pipeline for origin, pipeline in PipelineRegistry.entries().items()}
    if name not in known:
        raise UsageError(f"no pipeline is called `{name}`", hint=did_you_mean(name, list(known)))
    return known[name]
