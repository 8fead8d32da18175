"""`sdconvert mha2sha`: split the attention of any model's weights and encodings into single heads, and back."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdconvert.cli.session import Session, Table

if TYPE_CHECKING:
    from sdconvert.mha2sha.command import Mha2ShaSummary
    from sdconvert.mha2sha.proof_on_samples import SamplesProof

# Key of a figure of the proof → what a reader is told, and how.
_FIGURES = {
    "fp32_relative_error": ("fp32: SHA vs MHA at the output, largest relative error", "{:.1e}"),
    "worst_layer_fp32_relative_error": ("fp32: SHA vs MHA, worst layer", "{:.1e}"),
    "quantized_sha_vs_mha_db": ("quantized: SHA vs MHA at the output", "{:.1f} dB"),
    "worst_layer_sha_vs_mha_db": ("quantized: SHA vs MHA, worst layer", "{:.1f} dB"),
    "inherit_vs_fp32_db": ("output vs fp32 with the parents' ranges", "{:.1f} dB"),
    "recalibrate_vs_fp32_db": ("output vs fp32 with the heads' own ranges", "{:.1f} dB"),
}


class WeightsFormat(StrEnum):
    """Format of the weights that are written."""

    SAFETENSORS = "safetensors"
    PTH = "pth"


class HeadRanges(StrEnum):
    """Where the ranges of tensors inside attention come from."""

    INHERIT = "inherit"
    RECALIBRATE = "recalibrate"


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
    samples: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Graph inputs, as calibration writes them, to run both forms on."),
    ] = None,
    activation_encodings: Annotated[
        HeadRanges, typer.Option(help="Ranges inside attention: the parent's for each head, or its own by --samples.")
    ] = HeadRanges.INHERIT,
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

    recalibrate = activation_encodings is HeadRanges.RECALIBRATE
    checked = None
    if reverse:
        options: dict[str, object] = {"--num-heads": num_heads, "--num-heads-file": num_heads_file, "--format": format}
        options |= {"--skip-unsupported": skip_unsupported or None, "--rewrite": rewrite, "--samples": samples}
        options["--activation-encodings"] = recalibrate or None
        if idle := [name for name, value in options.items() if value is not None]:
            raise UsageError(
                f"{', '.join(idle)} has no effect with --reverse", hint="heads.json says how it was; leave it out"
            )
        result = reverse_folder(source, out, verify=verify)
    else:
        checked = _proof(source, samples, recalibrate=recalibrate, verify=verify)
        result = convert_folder(
            source,
            out,
            num_heads,
            format,
            heads_file=num_heads_file,
            skip_unsupported=skip_unsupported,
            rewrites=rewrite or (),
            proof=checked.proof if checked else None,
            verify=verify,
        )
    _show(ctx.obj, result, checked)


def _proof(source: Path, samples: Path | None, *, recalibrate: bool, verify: bool) -> "SamplesProof | None":
    """What runs both forms, if it is asked for; without, torch stays out."""
    from sdconvert.errors import UsageError

    if samples is None:
        if recalibrate:
            raise UsageError(
                "--activation-encodings recalibrate measures ranges, and there is nothing to measure them on",
                hint="give --samples with a folder of graph inputs, such as 20-calibration/calibration/unet of a run",
            )
        return None
    if not verify and not recalibrate:
        raise UsageError(
            "--samples has no effect with --no-verify: both forms are run on them to compare",
            hint="leave one of them out",
        )
    from sdconvert.mha2sha.proof_on_samples import proof_on_samples
    from sdconvert.mha2sha.source import find_source

    return proof_on_samples(find_source(source), samples, recalibrate=recalibrate, compare=verify)


def _show(session: Session, result: "Mha2ShaSummary", checked: "SamplesProof | None") -> None:
    summary = vars(result) | {"source": str(result.source), "out": str(result.out)}
    rows = [(key, _text(value)) for key, value in summary.items() if value is not None and not isinstance(value, dict)]
    rows += [
        (name, form.format(result.figures[key])) for key, (name, form) in _FIGURES.items() if key in result.figures
    ]
    tables = [Table(("what", "value"), rows)]
    if checked is not None and checked.unquantized:
        summary["unquantized"] = checked.unquantized
        rows.append(("quantized: not compared, for", checked.unquantized))
    if checked is not None and checked.proof.samples is not None:
        from sdconvert.io.files import read_json
        from sdconvert.mha2sha.artifact import HEAD_RANGES

        summary["head_ranges"] = read_json(result.out / HEAD_RANGES)
        gains = [
            (place, *(f"{one[key]:.1f} dB" for key in HeadRanges)) for place, one in summary["head_ranges"].items()
        ]
        tables.append(Table(("SQNR vs fp32 of", *HeadRanges), gains, right=tuple(HeadRanges)))
    if result.left_alone:
        tables.append(Table(("attention left alone", "why"), list(result.left_alone.items())))
    if result.left_out:
        tables.append(Table(("encoding that has no place in the result", "why"), list(result.left_out.items())))
    session.show(summary, *tables)


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
