"""The work of `10-checkpoint`: copy the model, load the copy strictly, write down what it is."""

import shutil
from typing import Any

from sdconvert.adapters import adapter_for
from sdconvert.artifacts import write_json_atomic
from sdconvert.checkpoint.source import PARTS, resolve_checkpoint
from sdconvert.pipelines.pasd import PASDPipeline
from sdconvert.stages import StageContext


def run(context: StageContext) -> dict[str, Any]:
    """Do the stage's work; see `Stage.run`."""
    source = resolve_checkpoint(context.recipe.checkpoint.path)
    for done, part in enumerate(PARTS):
        context.report.step(done, len(PARTS) + 1, part)
        shutil.copytree(source / part, context.out / "model" / part)
    pipe = PASDPipeline.from_pretrained(context.out / "model")
    models = {"unet": pipe.unet, "controlnet": pipe.controlnet, "vae": pipe.vae}
    facts = {
        name: {
            "class": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "attention_layers": [vars(layer) for layer in adapter_for(model).attention_layers()],
        }
        for name, model in models.items()
    }
    write_json_atomic(facts, context.out / "model.json")
    return {f"{name}_parameters": fact["parameters"] for name, fact in facts.items()}
