"""`sdconvert quantize`: the stage; what layers lose when they get fewer bits; and a recipe of mixed bit-widths."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sdconvert.cli.convert import (
    STAGE_COMMANDS,
    BuildOption,
    RecipeArgument,
    SetOption,
    bring_up_to_date,
    stage_command,
)
from sdconvert.cli.session import Session, Table

SENSITIVITY = "sensitivity.json"
_STAGE = "stage"
_WORST = 10


class _StageFirst(TyperGroup):
    """`quantize RECIPE` and `quantize --fresh` are the stage; only the names of the other commands are commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the stage's name before what names no command."""
        known = {*self.commands, *ctx.help_option_names}
        return super().parse_args(ctx, args if args and args[0] in known else [_STAGE, *args])


@dataclass(frozen=True)
class _Work:
    """What progress is shown of."""

    name: str
    title: str


app = typer.Typer(cls=_StageFirst, help=STAGE_COMMANDS["quantize"][1])
app.command(_STAGE, help="Run up to the quantized model; `quantize RECIPE` is short for this.")(
    stage_command("quantize")
)


@app.command()
def sensitivity(
    ctx: typer.Context,
    recipe: RecipeArgument = "pasd_tiny",
    set_: SetOption = None,
    bits: Annotated[list[int] | None, typer.Option(metavar="N", help="Bits per weight; default: 4 and 8.")] = None,
    graph: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this graph; default: all.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Held-out inputs per graph, spread over timesteps, or all.")] = 4,
    picture: Annotated[
        bool, typer.Option("--picture/--no-picture", help="Draw a held-out tile for every layer, too.")
    ] = True,
    build: BuildOption = Path("build"),
) -> None:
    """Measure what each layer loses with fewer bits.

    Everything but the layer stays in fp32. Figures are kept in `sensitivity.json` of the run folder, and a run that was
    stopped goes on there.
    """
    from sdconvert.cli.progress import open_progress
    from sdconvert.quantize.sensitivity import measure_run

    session: Session = ctx.obj
    loaded, run, _ = bring_up_to_date(session, recipe, set_, build, to="calibration")
    path = run.root / SENSITIVITY
    with open_progress(session.progress) as progress:
        progress.begin(_Work("sensitivity", "what each layer loses with fewer bits"), f"kept in {path}")
        graphs = measure_run(
            run, loaded, path, bits or (), graph or (), samples=samples, picture=picture, report=progress.step
        )
    session.show({"file": str(path), "graphs": graphs}, *_tables(graphs), f"figures: {path}")


@app.command("recipe")
def mixed_recipe(
    ctx: typer.Context,
    recipe: RecipeArgument = "pasd_tiny",
    set_: SetOption = None,
    target_bits: Annotated[float | None, typer.Option(metavar="N", help="Bits per weight, on average.")] = None,
    target_size: Annotated[str | None, typer.Option(metavar="SIZE", help="Of all weights, as `300MiB`.")] = None,
    target_sqnr: Annotated[float | None, typer.Option(metavar="DB", help="Predicted SQNR of the picture.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Recipe to write.")] = Path("mixed.yaml"),
    build: BuildOption = Path("build"),
) -> None:
    """Write a recipe with bit-widths per layer.

    They come from the figures of `quantize sensitivity` in the same run folder: the best model of at most a size, or
    the smallest of at least a quality.
    """
    from sdconvert.artifacts import RunFolder
    from sdconvert.config import dump_recipe, load_recipe, parse_size
    from sdconvert.io.files import write_text_atomic
    from sdconvert.quantize.mixed_precision import choose, frontier, read_sensitivity, with_choice

    loaded = load_recipe(recipe, set_)
    path = RunFolder(build / loaded.name).root / SENSITIVITY
    choices = frontier(read_sensitivity(path))
    size = parse_size(target_size, "--target-size") if target_size else None
    choice = choose(choices, target_bits=target_bits, target_bytes=size, target_db=target_sqnr)
    write_text_atomic(dump_recipe(with_choice(loaded, choice, out.stem, path)), out)
    data = {
        "recipe": str(out),
        "bits_per_weight": round(choice.bits_per_weight, 3),
        "weight_bytes": choice.weight_bytes,
        "predicted_db": round(choice.predicted_db, 2),
        "layers": {bits: list(choice.bits.values()).count(bits) for bits in sorted(set(choice.bits.values()))},
    }
    session: Session = ctx.obj
    session.show(data, Table(("what", "value"), list(data.items())), f"next:   sdconvert convert {out}")


def _tables(graphs: dict[str, Any]) -> list[Table]:
    """Of every graph, the layers that lose most at the fewest bits."""
    tables = []
    for name, found in graphs.items():
        bits = min(found["cumulative"], key=int)
        worst = sorted(found["layers"].items(), key=lambda item: item[1]["output_db"][bits])[:_WORST]
        rows = [
            (layer, entry["weights"], _decibels(entry["output_db"][bits]), _decibels(entry["picture_db"].get(bits)))
            for layer, entry in worst
        ]
        columns = (f"{name}, {bits} bits: most sensitive", "weights", "output, dB", "picture, dB")
        tables.append(Table(columns, rows, right=columns[1:]))
    return tables


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
