"""`sdconvert plan`: what a conversion would do, before it does anything."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sdconvert.cli.convert import BuildOption, RecipeArgument, SetOption, SocOption, recipe_changes
from sdconvert.cli.session import Session, Table, amount

if TYPE_CHECKING:
    from sdconvert.stages import StagePlan


def plan(
    ctx: typer.Context,
    recipe: RecipeArgument = "pasd_tiny",
    set_: SetOption = None,
    soc: SocOption = None,
    build: BuildOption = Path("build"),
) -> None:
    """Say which stages would run, why, and what each took last time; nothing is written."""
    from sdconvert.artifacts import RunFolder
    from sdconvert.cli.road import load_road
    from sdconvert.config import load_recipe
    from sdconvert.stages import plan_stages

    chosen = load_recipe(recipe, recipe_changes(set_, soc))
    run = RunFolder(build / chosen.name)
    plans = plan_stages(chosen, run, load_road())
    session: Session = ctx.obj
    running = [plan for plan in plans if plan.state == "run"]
    known = [plan.last.seconds for plan in running if plan.last]
    total = f"{len(running)} of {len(plans)} stages would run"
    if running:
        total += f"; {len(known)} of them took {sum(known):.0f} s last time"
    data = {"recipe": chosen.name, "run": str(run.root), "stages": [_record(plan) for plan in plans]}
    columns = ("stage", "would", "why", "last: seconds", "memory", "disk")
    session.show(data, Table(columns, [_row(plan) for plan in plans], right=columns[3:]), total)


def _record(plan: "StagePlan") -> dict[str, Any]:
    last = plan.last and {
        "seconds": plan.last.seconds,
        "peak_rss_bytes": plan.last.peak_rss_bytes,
        "disk_bytes": _disk_bytes(plan),
    }
    return {"stage": plan.stage, "state": plan.state, "why": plan.why, "last": last}


def _row(plan: "StagePlan") -> tuple[str, ...]:
    if plan.last is None:
        return plan.stage, plan.state, plan.why, "", "", ""
    figures = f"{plan.last.seconds:.1f}", amount(plan.last.peak_rss_bytes), amount(_disk_bytes(plan))
    return plan.stage, plan.state, plan.why, *figures


def _disk_bytes(plan: "StagePlan") -> int:
    return sum(output.bytes for output in plan.last.outputs.values()) if plan.last else 0
