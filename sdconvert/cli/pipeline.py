"""`sdconvert pipeline`: what the pipelines are made of."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdconvert.cli.session import Session, Table

if TYPE_CHECKING:
    from sdconvert.pipelines.graph import PipelineUnitGraph

app = typer.Typer(help="Show what the pipelines are made of.")


# Without a second command typer would make `graph` the whole of `sdconvert pipeline`.
@app.callback()
def _pipeline() -> None:
    """Show what the pipelines are made of."""


@app.command()
def graph(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="A pipeline class.")] = "PASDPipeline",
    split: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Say what can run before this model is there.")
    ] = None,
) -> None:
    """Print the units of a pipeline: what each reads, from whom, what it writes, and which models it calls.

    Comes from the declarations alone; no weights are read.
    """
    from sdconvert.pipelines.graph import PipelineUnitGraph
    from sdconvert.pipelines.registry import pipeline_class

    pipeline = pipeline_class(name)
    drawn = PipelineUnitGraph(pipeline.declared_units())
    ahead = {unit.name for unit in drawn.split_pipeline_units(split)[0]} if split else set()
    units = _describe(drawn)
    columns: tuple[str, ...] = ("unit", "mode", "reads", "writes", "models")
    rows: list[tuple[str, ...]] = [
        (
            f"{unit['unit']} (if {' or '.join(unit['triggers'])})" if unit["triggers"] else unit["unit"],
            unit["mode"],
            ", ".join(f"{key} ← {writer}" if writer else key for key, writer in unit["reads"].items()),
            ", ".join(unit["writes"]),
            ", ".join(_model(model, key, unit["triggers"]) for model, key in unit["models"].items()),
        )
        for unit in units
    ]
    if split:
        columns = (*columns, f"before {', '.join(split)}")
        rows = [(*row, "yes" if unit["unit"] in ahead else "") for row, unit in zip(rows, units, strict=True)]
        units = [{**unit, "ahead": unit["unit"] in ahead} for unit in units]
    session: Session = ctx.obj
    data = {"pipeline": pipeline.__name__, "models": list(drawn.model_names), "units": units}
    session.show(
        data, f"{pipeline.__name__}: {len(rows)} units; what has no ← is given by the caller", Table(columns, rows)
    )


def _describe(drawn: "PipelineUnitGraph") -> list[dict[str, Any]]:
    return [
        {
            "unit": unit.name,
            "mode": unit.mode,
            "reads": {edge.key: edge.source for edge in drawn.edges if edge.target == unit.name},
            "writes": list(unit.writes),
            "models": unit.models_needed(unit.reads),
            "triggers": list(unit.trigger_params),
        }
        for unit in drawn.units
    ]


def _model(name: str, asked_by: str, triggers: list[str]) -> str:
    """A model, and what asks for it where the unit does not say so already."""
    return f"{name} (if {asked_by})" if asked_by and not triggers else name
