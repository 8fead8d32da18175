"""`sdconvert plugins`: what the plugins of a conversion are on."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdconvert.cli.convert import RecipeArgument, SetOption
from sdconvert.cli.session import Session, Table

if TYPE_CHECKING:
    from sdconvert.config import Recipe
    from sdconvert.plugins.resolve import Resolved

app = typer.Typer(help="Show what the plugins of a conversion are on.")
ConfigOption = Annotated[Path | None, typer.Option(metavar="YAML", help="Plugins to resolve too: plugin_unet, ...")]


@app.callback()
def _group() -> None:
    """Keep `resolve` a command of its own: a group of one command would be that command."""


@app.command()
def resolve(
    ctx: typer.Context, recipe: RecipeArgument = "pasd_tiny", set_: SetOption = None, config: ConfigOption = None
) -> None:
    """Print every selector of a conversion, and each layer of the recipe's model that it finds.

    These are the plugins that a checkpoint is loaded with, those that make it a static graph, the rewrite of
    attention per head, the recipe's LoRA files, and the plugins of --config. Nothing is written.
    """
    from sdconvert.checkpoint.source import resolve_checkpoint
    from sdconvert.config import load_recipe
    from sdconvert.pipelines.pasd import PASDPipeline

    loaded = load_recipe(recipe, set_)
    pipe = PASDPipeline.from_pretrained(resolve_checkpoint(loaded.checkpoint.path))
    found = _resolve_recipe(pipe, loaded) + ([] if config is None else _resolve_file(pipe, config))
    rows = [(model, one.plugin, one.role, one.selector or "''", one.layer or "''") for model, one in found]
    data = {"recipe": loaded.name, "matches": [{"model": model} | asdict(one) for model, one in found]}
    session: Session = ctx.obj
    session.show(data, Table(("model", "plugin", "role", "selector", "layer"), rows))


def _resolve_recipe(pipe: Any, recipe: "Recipe") -> list[tuple[str, "Resolved"]]:
    from sdconvert.models.attention import SHAAttentionPatch
    from sdconvert.pipelines.backend import graph_adapters
    from sdconvert.plugins.resolve import Resolved, resolve_attached

    found = []
    for name, adapter in graph_adapters(pipe, recipe.pipeline.conditioning_scale).items():
        with adapter.surgery():
            found += [(name, one) for one in resolve_attached(adapter.model)]
        if adapter.attention_layers():
            heads = SHAAttentionPatch.find_layers(adapter.model)
            label, selector = f"sha ({SHAAttentionPatch.__name__})", "cls(Attention):re:"
            found += [(name, Resolved(label, "patch", selector, m.path, type(m.module).__name__)) for m in heads]
    return found + _resolve_loras(pipe, recipe)


def _resolve_loras(pipe: Any, recipe: "Recipe") -> list[tuple[str, "Resolved"]]:
    from sdconvert.checkpoint.loras import STEMS
    from sdconvert.plugins.lora_attach import match_lora
    from sdconvert.plugins.resolve import Resolved

    models = {name: getattr(pipe, name) for name in STEMS}
    return [
        (
            component,
            Resolved(f"{Path(lora.path).name} x {lora.scale:g}", "fused", update.keys[0], path, type(layer).__name__),
        )
        for lora in recipe.checkpoint.loras
        for component, path, layer, update in match_lora(models, Path(lora.path))
    ]


def _resolve_file(pipe: Any, path: Path) -> list[tuple[str, "Resolved"]]:
    from sdconvert.plugins.configuration import SECTIONS, read_plugin_config, section_models
    from sdconvert.plugins.resolve import resolve_config

    config = read_plugin_config(path)
    return [
        (SECTIONS[section], one)
        for section, model in section_models(pipe, config).items()
        for one in resolve_config(model, config[section])
    ]
