"""`sdconvert compare`: two results of `sdconvert bench` side by side."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sdconvert.cli.session import Session, Table


def compare(
    ctx: typer.Context,
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder that `sdconvert bench` wrote, or its bench.json.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one, of the same graphs on the same SoC.")],
) -> None:
    """Compare two results of a bench: how their times relate, and how their answers differ.

    Two builds are compared best in one session, in turns: `sdconvert bench A B`.
    """
    from sdconvert.android.artifact import read_bench
    from sdconvert.android.compare import compare as compare_results

    comparison = compare_results(read_bench(first), read_bench(second))
    session: Session = ctx.obj
    session.show(comparison, *comparison_blocks(comparison))


def comparison_blocks(comparison: dict[str, Any]) -> list[Table | str]:
    """Return what is shown of a comparison."""
    from sdconvert.android.compare import compare_columns, compare_rows

    columns = compare_columns()
    return [*comparison["notes"], Table(columns, compare_rows(comparison), columns[1:])]
