"""`sdconvert convert` and the commands that walk the same road up to one stage."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdconvert.cli.session import Session, Table
from sdconvert.errors import QualityGateError

if TYPE_CHECKING:
    from sdconvert.artifacts import RunFolder
    from sdconvert.config import Recipe
    from sdconvert.stages import StageOutcome

RecipeArgument = Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe that ships with sdconvert.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace one value of the recipe: `a.b=c`.")
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Redo every stage, even where nothing changed.")]
SocOption = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Target SoC instead of the recipe's.")]
BuildOption = Annotated[Path, typer.Option(help="Folder of all runs.")]
FromOption = Annotated[str | None, typer.Option("--from", metavar="STAGE", help="First stage to bring up to date.")]
ToOption = Annotated[str | None, typer.Option("--to", metavar="STAGE", help="Last stage to bring up to date.")]
MemoryOption = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Weights in calibration, and what AdaRound works on, take no more: `4GiB`."),
]

_MEMORY_KEYS = ("calibration.memory_limit", "quantize.adaround.memory_limit")
STAGE_COMMANDS = {
    "calibrate": ("calibration", "Run up to calibration."),
    "quantize": ("quantize", "Run up to the quantized model and its encodings."),
    "export": ("export", "Run up to the ONNX files."),
    "compile": ("qnn", "Run up to the context binaries."),
    "package": ("android", "Run up to the bundle for the phone."),
    "report": ("report", "Run up to the report."),
}


def convert(
    ctx: typer.Context,
    recipe: RecipeArgument = "pasd_tiny",
    set_: SetOption = None,
    from_: FromOption = None,
    to: ToOption = None,
    fresh: FreshOption = False,
    soc: SocOption = None,
    max_memory: MemoryOption = None,
    build: BuildOption = Path("build"),
) -> None:
    """Convert a checkpoint into a bundle.

    Every stage of the road is brought up to date: it is reused where nothing changed that it depends on, and redone
    otherwise.
    """
    _walk(ctx.obj, recipe, set_, soc, build, from_=from_, to=to, fresh=fresh, max_memory=max_memory)


def stage_command(to: str) -> Callable[..., None]:
    """Make the command that walks the road up to the stage `to`."""

    def command(
        ctx: typer.Context,
        recipe: RecipeArgument = "pasd_tiny",
        set_: SetOption = None,
        fresh: FreshOption = False,
        soc: SocOption = None,
        build: BuildOption = Path("build"),
    ) -> None:
        _walk(ctx.obj, recipe, set_, soc, build, from_=None, to=to, fresh=fresh)

    return command


def recipe_changes(overrides: list[str] | None, socs: list[str] | None) -> list[str]:
    """Return what `--set` and `--soc` change in a recipe, as `--set` takes it."""
    return [*(overrides or []), *([f"qnn.socs={json.dumps(socs)}"] if socs else [])]


def bring_up_to_date(
    session: Session,
    recipe_name: str,
    changes: list[str] | None,
    build: Path,
    *,
    from_: str | None = None,
    to: str | None = None,
    fresh: bool = False,
) -> "tuple[Recipe, RunFolder, list[StageOutcome]]":
    """Walk the road with a recipe, up to the stage `to` or to its end."""
    from sdconvert.artifacts import RunFolder
    from sdconvert.cli.progress import open_progress
    from sdconvert.cli.road import load_road
    from sdconvert.config import load_recipe
    from sdconvert.stages import run_stages

    recipe = load_recipe(recipe_name, changes)
    run = RunFolder(build / recipe.name)
    with open_progress(session.progress) as progress:
        stages = load_road(_length(to))
        outcomes = run_stages(recipe, run, stages, from_=from_, to=to, fresh=fresh, progress=progress)
    return recipe, run, outcomes


def _length(to: str | None) -> int:
    from sdconvert.cli.road import ROAD
    from sdconvert.stages import find_stage

    return find_stage(to, list(ROAD)) + 1 if to else len(ROAD)


def _walk(
    session: Session,
    recipe_name: str,
    overrides: list[str] | None,
    socs: list[str] | None,
    build: Path,
    *,
    from_: str | None,
    to: str | None,
    fresh: bool,
    max_memory: str | None = None,
) -> None:
    from sdconvert.android.artifact import BUNDLE
    from sdconvert.cli.road import ROAD

    changes = recipe_changes(overrides, socs)
    if max_memory is not None:
        from sdconvert.config import load_recipe

        rounds = load_recipe(recipe_name, changes).quantize.adaround is not None
        changes += [f"{key}={max_memory}" for key in (_MEMORY_KEYS if rounds else _MEMORY_KEYS[:1])]
    recipe, run, outcomes = bring_up_to_date(session, recipe_name, changes, build, from_=from_, to=to, fresh=fresh)
    length = _length(to)
    report = run.stage_folder("80-report") / "report.html"
    if length < len(ROAD):
        again = [part for change in changes for part in ("--set", change)]
        place = [] if build == Path("build") else ["--build", str(build)]
        following = shlex.join(["sdconvert", "convert", recipe_name, *again, *place])
    else:
        following = shlex.join(["sdconvert", "inspect", str(run.stage_folder("70-android") / BUNDLE)])
    data = {
        "recipe": recipe.name,
        "run": str(run.root),
        "stages": [vars(outcome) for outcome in outcomes],
        "report": str(report) if length == len(ROAD) else None,
        "next": following,
    }
    rows = [(o.stage, o.state, _note(o.why, o.metrics), f"{o.seconds:.1f}") for o in outcomes]
    lines = [f"report: {report}"] if length == len(ROAD) else []
    table = Table(("stage", "result", "note", "seconds"), rows, right=("seconds",))
    session.show(data, table, *lines, f"next:   {following}")
    if missed := [gate for outcome in outcomes for gate in outcome.metrics.get("missed_gates", [])]:
        raise QualityGateError(f"missed: {'; '.join(missed)}", hint="see the report for the layers that lose most")


def _note(why: str, metrics: dict[str, Any]) -> str:
    note = metrics.get("note")
    return f"{note} ({why})" if note else why
