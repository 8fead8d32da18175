"""The work of `10-checkpoint`: copy the model, load the copy strictly, fuse LoRAs, write down what it is."""

import shutil
from typing import Any

from torch import nn

from sdconvert.adapters import adapter_for, require_capabilities
from sdconvert.adapters.schedulers import require_expressible
from sdconvert.checkpoint.loras import STEMS, fuse_loras
from sdconvert.checkpoint.source import PARTS, resolve_checkpoint
from sdconvert.config import Recipe
from sdconvert.io.files import write_json_atomic
from sdconvert.pipelines.pasd import PASDPipeline
from sdconvert.stages import StageContext

SPLIT_PER_HEAD = ("unet", "controlnet")


def run(context: StageContext) -> dict[str, Any]:
    """Do the stage's work; see `Stage.run`."""
    source = resolve_checkpoint(context.recipe.checkpoint.path)
    for done, part in enumerate(PARTS):
        context.report.step(done, len(PARTS) + 1, part)
        shutil.copytree(source / part, context.out / "model" / part)
    pipe = PASDPipeline.from_pretrained(context.out / "model")
    _require_support(pipe, context.recipe)
    metrics: dict[str, Any] = {}
    if loras := context.recipe.checkpoint.loras:
        context.report.step(len(PARTS), len(PARTS) + 1, "LoRA")
        layers = fuse_loras({name: getattr(pipe, name) for name in STEMS}, loras, context.out / "model")
        metrics = {"lora_layers": layers, "note": f"{len(loras)} LoRA fused into {sum(layers)} layers"}
        pipe = PASDPipeline.from_pretrained(context.out / "model")  # what was written is read as strictly
    facts = {
        name: {
            "class": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "attention_layers": [vars(layer) for layer in adapter_for(model).attention_layers()],
        }
        for name, model in _models(pipe).items()
    }
    write_json_atomic(facts, context.out / "model.json")
    return metrics | {f"{name}_parameters": fact["parameters"] for name, fact in facts.items()}


def _require_support(pipe: PASDPipeline, recipe: Recipe) -> None:
    """Refuse at once what a later stage would refuse after hours: a model that is no graph, a request it cannot meet.

    Raises:
        UnsupportedSchedulerError: No table expresses the sampler, which the bundle is to replay.
        UnsupportedModelError: Names all parts of a model that stand in the way.
        CapabilityError: Names all requests.
    """
    require_expressible(pipe.scheduler)
    adapters = {name: adapter_for(model) for name, model in _models(pipe).items()}
    for adapter in adapters.values():
        adapter.check()
    require_capabilities(
        {name: (type(adapter.model).__name__, adapter.capabilities) for name, adapter in adapters.items()},
        {
            name: {
                "quantize": True,
                "adaround": recipe.quantize.adaround is not None,
                "mha2sha": name in SPLIT_PER_HEAD,
            }
            for name in adapters
        },
    )


def _models(pipe: PASDPipeline) -> dict[str, nn.Module]:
    return {"unet": pipe.unet, "controlnet": pipe.controlnet, "vae": pipe.vae}
