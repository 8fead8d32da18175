"""`sdconvert encodings`: encodings files of AIMET's versions."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sdconvert.cli.session import Session, Table

app = typer.Typer(help="Work on encodings files.")


class Version(StrEnum):
    """A version that can be written."""

    V0_6_1 = "0.6.1"
    V1_0_0 = "1.0.0"
    V2_0_0 = "2.0.0"


@app.command()
def convert(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="An encodings file of version 0.6.1, 1.0.0, 2.0.0 or 2.1.0.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="File to write.")],
    to: Annotated[Version, typer.Option("--to", help="Version to write.")],
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights of the model, where shapes are needed.")
    ] = None,
) -> None:
    """Write an encodings file in another version.

    Grids are kept to the last bit, or the conversion is refused; what the version has no place for is listed.
    """
    from sdconvert.errors import EncodingsError, UsageError
    from sdconvert.io.encodings import read_encodings_file
    from sdconvert.io.encodings.convert import convert as convert_file
    from sdconvert.io.tensors import tensor_shapes

    if out.resolve() == file.resolve():
        raise UsageError(f"`{out}` is the file itself", hint="name another with -o")
    read = read_encodings_file(file)
    try:
        result = convert_file(read, str(to), tensor_shapes(weights) if weights else None)
    except EncodingsError as error:
        raise EncodingsError(f"`{file}`: {error.args[0]}", hint=error.hint) from error
    result.file.write(out)
    counts = {section: len(entries) for section, entries in result.file.tensors.items()}
    data = {"file": str(file), "out": str(out), "from": read.version, "to": str(to), **counts}
    session: Session = ctx.obj
    lost = [Table(("not in the result", "why"), list(result.lost.items()))] if result.lost else []
    session.show(data | {"lost": result.lost}, Table(("what", "value"), list(data.items())), *lost)
