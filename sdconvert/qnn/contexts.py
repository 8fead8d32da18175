"""Every graph of a run, compiled for every SoC; what is compiled outlives a failure of the rest."""

import shutil
from pathlib import Path

from sdconvert.errors import CompileError
from sdconvert.export.artifact import ExportArtifact
from sdconvert.io.files import read_json, write_json_atomic
from sdconvert.processes import Task, in_threads, jobs_for
from sdconvert.qnn.artifact import context_record, read_context
from sdconvert.qnn.context import Context, compile_context
from sdconvert.qnn.io_check import require_io
from sdconvert.qnn.needs import bytes_to_compile
from sdconvert.soc import Soc, find_soc
from sdconvert.stages import StageContext

_PARTIAL = ".partial-*"


def compile_contexts(context: StageContext) -> list[Context]:
    """Compile every graph for every SoC; the files lie below `context.out`.

    A graph that fails keeps no other from being compiled. What was compiled stays in the stage's scratch folder, and
    the next run of the same recipe goes on from there.

    Raises:
        CompileError: The compiler refused a graph, or was killed; the message names all such graphs.
        EnvironmentProblem: The disk is full.
    """
    exported = ExportArtifact(context.run.stage_folder("50-export"))
    socs = [find_soc(name) for name in dict.fromkeys(context.recipe.qnn.socs)]
    graphs = exported.compiled_graphs()
    # The largest come first, so that no process ends alone.
    by_size = sorted(graphs, key=exported.graph_bytes, reverse=True)
    tasks: list[Task] = [(_compile_once, (context, exported, graph, soc)) for graph in by_size for soc in socs]
    found: dict[int, Context | CompileError] = {}
    context.report.step(0, len(tasks), f"compile {len(graphs)} graphs for {', '.join(soc.name for soc in socs)}")
    largest = bytes_to_compile(exported.graph_bytes(by_size[0]), context.recipe.pipeline.latent_tile)
    for index, made in in_threads(tasks, jobs_for(largest)):
        found[index] = made
        if len(found) < len(tasks) and isinstance(made, Context):
            context.report.step(len(found), len(tasks), f"compiled {made.graph} for {made.soc.name}")
    failures = [one for one in found.values() if isinstance(one, CompileError)]
    if failures:
        raise _joined(failures, len(tasks))
    for soc in socs:
        ignore = shutil.ignore_patterns(_PARTIAL)  # of a process that was killed
        shutil.copytree(context.scratch / soc.name, context.out / soc.name, ignore=ignore)
    return [_kept(context, context.out, graph, soc) for soc in socs for graph in graphs]


def _compile_once(context: StageContext, exported: ExportArtifact, graph: str, soc: Soc) -> Context | CompileError:
    record = _record(context, graph, soc)
    if record.is_file():
        return _kept(context, context.scratch, graph, soc)
    recipe, folder = context.recipe, context.scratch / soc.name
    try:
        compiled = compile_context(
            exported.onnx(graph),
            folder,
            soc,
            finalization_mode=recipe.qnn.finalization_mode,
            dlc="dlc" in recipe.export.targets,
        )
        require_io(compiled, exported.io(graph))
    except CompileError as error:
        return error
    write_json_atomic(context_record(compiled, context.scratch), record)
    return compiled


def _record(context: StageContext, graph: str, soc: Soc) -> Path:
    return context.scratch / f"{soc.name}-{graph}.json"


def _kept(context: StageContext, folder: Path, graph: str, soc: Soc) -> Context:
    """What was compiled, with its files below a folder."""
    return read_context(read_json(_record(context, graph, soc)), folder)


def _joined(failures: list[CompileError], tasks: int) -> CompileError:
    done = tasks - len(failures)
    kept = f"; {done} of {tasks} contexts are kept, and the same command goes on from there" if done else ""
    return CompileError("\n".join(str(error.args[0]) for error in failures), hint=f"{failures[0].hint}{kept}")
