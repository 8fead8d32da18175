"""`sdconvert mha2sha`: split the attention of any folder of weights and encodings into single heads."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sdconvert.cli.session import Session, Table


class WeightsFormat(StrEnum):
    """Format of the weights that are written."""

    SAFETENSORS = "safetensors"
    PTH = "pth"


def mha2sha(
    ctx: typer.Context,
    source: Annotated[
        Path, typer.Argument(help="A folder with state_dict_mha.safetensors or .pth, and encodings if there are any.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the result.")] = Path("sha"),
    num_heads: Annotated[
        int | None, typer.Option(min=1, help="Heads of every attention, where no config.json says so.")
    ] = None,
    format: Annotated[WeightsFormat | None, typer.Option(help="Format of the weights; default: the source's.")] = None,
) -> None:
    """Split every attention into single heads.

    Weights are cut into bit-equal slices, and encodings with them; the source is not touched.
    """
    from sdconvert.mha2sha.command import convert_folder

    summary = vars(convert_folder(source, out, num_heads, format)) | {"source": str(source), "out": str(out)}
    session: Session = ctx.obj
    session.show(summary, Table(("what", "value"), list(summary.items())))
