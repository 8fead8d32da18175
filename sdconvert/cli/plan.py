"""`sdconvert plan`: what a conversion would do, before it does anything."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdconvert.cli.convert import BuildOption, RecipeArgument, SetOption, SocOption, recipe_changes
from sdconvert.cli.session import Session, Table, amount

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdconvert.config import Recipe
    from sdconvert.errors import BudgetError
    from sdconvert.stages import Need, Stage, StagePlan

LimitOption = Annotated[
    str | None,
    typer.Option("--max-memory", metavar="SIZE", help="Exit with 5 if a stage that would run needs more: `16GiB`."),
]


def plan(
    ctx: typer.Context,
    recipe: RecipeArgument = "pasd_tiny",
    set_: SetOption = None,
    soc: SocOption = None,
    max_memory: LimitOption = None,
    build: BuildOption = Path("build"),
) -> None:
    """Say which stages would run, why, what each took last time and what memory it needs; nothing is written.

    Memory is estimated where it grows with the model, for the largest process of `export` and for the compiler.
    """
    from sdconvert.artifacts import RunFolder
    from sdconvert.cli.road import load_road
    from sdconvert.config import load_recipe
    from sdconvert.stages import plan_stages

    limit = _limit(max_memory)
    chosen = load_recipe(recipe, recipe_changes(set_, soc))
    run, road = RunFolder(build / chosen.name), load_road()
    plans = plan_stages(chosen, run, road)
    session: Session = ctx.obj
    running = [plan for plan in plans if plan.state == "run"]
    needs = _needs(chosen, [stage for stage, plan in zip(road, plans, strict=True) if plan in running])
    known = [plan.last.seconds for plan in running if plan.last]
    total = f"{len(running)} of {len(plans)} stages would run"
    if running:
        total += f"; {len(known)} of them took {sum(known):.0f} s last time"
    stages = [_record(plan, needs.get(plan.stage)) for plan in plans]
    columns = ("stage", "would", "why", "last: seconds", "memory", "disk", "memory needed, about")
    rows = [_row(plan, needs.get(plan.stage)) for plan in plans]
    data = {"recipe": chosen.name, "run": str(run.root), "stages": stages}
    session.show(data, Table(columns, rows, right=columns[3:]), total)
    for stage, need in needs.items():
        if limit is not None and need.bytes > limit:
            raise _too_large(stage, need, limit)


def _needs(recipe: "Recipe", stages: "Sequence[Stage]") -> "dict[str, Need]":
    """What those of some stages take that know it."""
    from sdconvert.checkpoint.source import count_parameters, resolve_checkpoint
    from sdconvert.stages import Estimating

    known = [stage for stage in stages if isinstance(stage, Estimating)]
    counts = count_parameters(resolve_checkpoint(recipe.checkpoint.path)) if known else {}
    return {stage.name: stage.need(recipe, counts) for stage in known}


def _limit(size: str | None) -> int | None:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    from sdconvert.errors import UsageError

    try:
        return None if size is None else int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError as error:
        raise UsageError(f"`{size}` is no size", hint="write it as `12GiB`, or in bytes") from error


def _too_large(stage: str, need: "Need", limit: int) -> "BudgetError":
    from sdconvert.errors import BudgetError

    message = f"`{stage}` needs about {amount(need.bytes)} for {need.of}; the limit is {amount(limit)}"
    return BudgetError(message, hint=need.hint)


def _record(plan: "StagePlan", need: "Need | None") -> dict[str, Any]:
    last = plan.last and {
        "seconds": plan.last.seconds,
        "peak_rss_bytes": plan.last.peak_rss_bytes,
        "disk_bytes": _disk_bytes(plan),
    }
    expected = need and {"bytes": need.bytes, "of": need.of}
    return {"stage": plan.stage, "state": plan.state, "why": plan.why, "last": last, "need": expected}


def _row(plan: "StagePlan", need: "Need | None") -> tuple[str, ...]:
    figures: tuple[str, ...] = "", "", ""
    if plan.last is not None:
        figures = f"{plan.last.seconds:.1f}", amount(plan.last.peak_rss_bytes), amount(_disk_bytes(plan))
    return plan.stage, plan.state, plan.why, *figures, amount(need.bytes) if need else ""


def _disk_bytes(plan: "StagePlan") -> int:
    return sum(output.bytes for output in plan.last.outputs.values()) if plan.last else 0
