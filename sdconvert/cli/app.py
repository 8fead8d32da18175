"""The command `sdconvert`: global options, the list of commands, and the place where a failure gets its exit code."""

import functools
import logging
import sys
import traceback
import warnings
from types import TracebackType
from typing import Annotated

import typer
from typer.main import get_command

from sdconvert import __version__
from sdconvert.cli import adapters, config, encodings, pipeline, plugins, quantize
from sdconvert.cli.bench import bench
from sdconvert.cli.compare import compare
from sdconvert.cli.convert import STAGE_COMMANDS, convert, stage_command
from sdconvert.cli.doctor import doctor
from sdconvert.cli.inspect import inspect
from sdconvert.cli.mha2sha import mha2sha
from sdconvert.cli.plan import plan
from sdconvert.cli.session import ProgressStyle, Session
from sdconvert.errors import SdconvertError

_FLAGS = {"--json", "--version", "-v", "-vv", "-q", "--verbose", "--quiet"}
_INTERRUPTED = 130

app = typer.Typer(
    name="sdconvert",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(convert)
app.command()(plan)
for _name, (_to, _summary) in STAGE_COMMANDS.items():
    if _name == "quantize":
        app.add_typer(quantize.app, name=_name)
    else:
        app.command(_name, help=_summary)(stage_command(_to))
app.command()(bench)
app.command()(compare)
app.command()(mha2sha)
app.command()(inspect)
app.add_typer(adapters.app, name="adapters")
app.add_typer(config.app, name="config")
app.add_typer(encodings.app, name="encodings")
app.add_typer(plugins.app, name="plugins")
app.add_typer(pipeline.app, name="pipeline")
app.command()(doctor)


def _version(asked: bool) -> None:
    if asked:
        print(f"sdconvert {__version__}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    progress: Annotated[ProgressStyle, typer.Option(help="Progress on stderr.")] = ProgressStyle.AUTO,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="Log more; twice for all.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log errors only, and no progress.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which.")] = False,
) -> None:
    """A diffusers checkpoint goes in; a measured, ready-to-push Qualcomm Hexagon NPU bundle comes out."""
    session: Session = ctx.obj
    session.json, session.verbosity = json, -1 if quiet else verbose
    session.progress = ProgressStyle.NONE if quiet and progress is ProgressStyle.AUTO else progress
    _set_up_logging(session.verbosity)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave the process with the exit code that `sdconvert.errors` states."""
    given = _globals_first(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    session = Session(json="--json" in given)  # for errors in the options themselves
    sys.excepthook = functools.partial(_report_defect, session)
    sys.exit(_run(given, session))


def _run(arguments: list[str], session: Session) -> int:
    try:
        status = get_command(app).main(arguments, prog_name="sdconvert", standalone_mode=False, obj=session)
    except SdconvertError as error:
        session.fail(str(error.args[0]), error.hint, error.exit_code)
        return error.exit_code
    except typer.TyperException as error:
        session.fail(error.format_message(), "see `sdconvert --help`", error.exit_code)
        return error.exit_code
    if status == _INTERRUPTED:
        session.fail("interrupted", "run the same command again to go on", _INTERRUPTED)
    return status or 0


def _report_defect(
    session: Session, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if session.verbosity > 0:
        traceback.print_exception(kind, error, trace)
    hint = "this is a defect of sdconvert: run the same command with -v and report what it prints"
    session.fail(f"unexpected {kind.__name__}: {error}", hint, SdconvertError.exit_code)


def _globals_first(arguments: list[str]) -> list[str]:
    """Move the global options before the command, so that they may stand anywhere."""
    first, rest = [], []
    words = iter(arguments)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word in _FLAGS or word.startswith("--progress="):
            first.append(word)
        elif word == "--progress":
            first += [word, *[value for value in [next(words, None)] if value is not None]]
        else:
            rest.append(word)
    return first + rest


def _set_up_logging(verbosity: int) -> None:
    levels = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}
    logging.basicConfig(level=levels.get(verbosity, logging.DEBUG), stream=sys.stderr, format="%(name)s: %(message)s")
    if verbosity < 1:
        # Deprecations inside other people's packages are no news for who converts a model.
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
