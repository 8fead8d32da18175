"""`sdconvert mha2sha`: split the attention of any model's weights and encodings into single heads, and back."""

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
        Path,
        typer.Argument(
            help="A folder with state_dict_mha.safetensors or .pth, a diffusers model folder, or one weights file."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the result.")] = Path("sha"),
    num_heads: Annotated[
        int | None, typer.Option(min=1, help="Heads of every attention, where no config.json says so.")
    ] = None,
    num_heads_file: Annotated[
        Path | None, typer.Option(metavar="JSON", help="Heads by layer or pattern, where no config.json says so.")
    ] = None,
    format: Annotated[WeightsFormat | None, typer.Option(help="Format of the weights; default: the source's.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read the result again and compare it with the source.")
    ] = True,
    skip_unsupported: Annotated[
        bool, typer.Option("--skip-unsupported", help="Leave attention alone that cannot be split, and name it.")
    ] = False,
    rewrite: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Rewrite more than attention; several times for several.")
    ] = None,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="Rebuild the MHA form from a folder that this command wrote.")
    ] = False,
) -> None:
    """Split every attention into single heads.

    Weights are cut into bit-equal slices, and encodings with them; the source is not touched. `heads.json` in the
    result says which rows of which tensor each new tensor is.
    """
    from sdconvert.errors import UsageError
    from sdconvert.mha2sha.command import convert_folder, reverse_folder

    if reverse:
        options: dict[str, object] = {"--num-heads": num_heads, "--num-heads-file": num_heads_file, "--format": format}
        options |= {"--skip-unsupported": skip_unsupported or None, "--rewrite": rewrite}
        if idle := [name for name, value in options.items() if value is not None]:
            raise UsageError(
                f"{', '.join(idle)} has no effect with --reverse", hint="heads.json says how it was; leave it out"
            )
        result = reverse_folder(source, out, verify=verify)
    else:
        result = convert_folder(
            source,
            out,
            num_heads,
            format,
            heads_file=num_heads_file,
            skip_unsupported=skip_unsupported,
            rewrites=rewrite or (),
            verify=verify,
        )
    summary = vars(result) | {"source": str(source), "out": str(out)}
    rows = [(key, _text(value)) for key, value in summary.items() if value is not None and not isinstance(value, dict)]
    session: Session = ctx.obj
    tables = [Table(("what", "value"), rows)]
    if result.left_alone:
        tables.append(Table(("attention left alone", "why"), list(result.left_alone.items())))
    if result.left_out:
        tables.append(Table(("encoding that has no place in the result", "why"), list(result.left_out.items())))
    session.show(summary, *tables)


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
