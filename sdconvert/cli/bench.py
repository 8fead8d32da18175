"""`sdconvert bench`: run a bundle on a phone or in the simulator, and score it."""

from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdconvert.cli.compare import comparison_blocks
from sdconvert.cli.session import Session, Table

if TYPE_CHECKING:
    from sdconvert.android.manifest import Manifest
    from sdconvert.android.measure import Job
    from sdconvert.android.runners import Runner
    from sdconvert.android.timing import LoopMode, Plan

_ROUNDS = 10


class RunnerName(StrEnum):
    """Who runs the graphs."""

    QNN_NET_RUN = "qnn-net-run"
    ORT = "ort"
    SIM = "sim"


class Loop(StrEnum):
    """How the test pictures are sampled."""

    CLOSED = "closed"
    TEACHER_FORCED = "teacher-forced"
    BOTH = "both"
    NONE = "none"


def bench(
    ctx: typer.Context,
    bundles: Annotated[
        list[Path], typer.Argument(help="A bundle, folder or tar, such as build/pasd_tiny/70-android/bundle; or two.")
    ],
    runner: Annotated[
        RunnerName, typer.Option(help="On an Android phone; on the Linux board that this is; in the simulator.")
    ] = (RunnerName.QNN_NET_RUN),
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the result.")] = Path("bench"),
    inferences: Annotated[int, typer.Option(min=1, help="How often each graph is run for its time.")] = 100,
    qairt_sdk: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The QAIRT SDK with runner and libraries for the phone.")
    ] = None,
    serial: Annotated[str | None, typer.Option(help="Which phone, as `adb devices` calls it.")] = None,
    adb: Annotated[Path | None, typer.Option(metavar="FILE", help="The program adb; default: the one on PATH.")] = None,
    remote_dir: Annotated[str | None, typer.Option(metavar="DIR", help="Folder on the phone.")] = None,
    soc: Annotated[str | None, typer.Option(metavar="NAME", help="With sim: which SoC of the bundle.")] = None,
    cool_down: Annotated[
        int | None, typer.Option(metavar="SECONDS", min=0, help="Longest wait for a cool phone; default: 300.")
    ] = None,
    op_profile: Annotated[
        bool, typer.Option("--op-profile", help="Take the cycles of every op too, in a run of its own.")
    ] = False,
    sustained: Annotated[
        float | None, typer.Option(metavar="MINUTES", min=0.1, help="Run the dominant graph so long without a pause.")
    ] = None,
    loop: Annotated[
        Loop | None,
        typer.Option(
            help="Sample the test pictures: each step from where the last one ended, or from where fp32 was. "
            "Default: both, if the bundle holds pictures."
        ),
    ] = None,
) -> None:
    """Run a bundle, or two in turns, and compare its answers with those expected.

    Only what changed is sent to the phone. `bench.json` keeps every time as it was taken; the simulator's times are no
    figure of a device. Two bundles take turns on one device, are compared, and have the results `a`, `b` and `compare`.
    """
    from sdconvert.android.measure import Job
    from sdconvert.android.timing import Plan
    from sdconvert.android.verify import opened_bundle
    from sdconvert.errors import UsageError

    for_phones: dict[str, object] = {
        "--qairt-sdk": qairt_sdk,
        "--serial": serial,
        "--adb": adb,
        "--remote-dir": remote_dir,
    }
    for_phones |= {"--op-profile": op_profile or None, "--sustained": sustained}
    _refuse_idle(runner, for_phones, {"--soc": soc}, {"--cool-down": cool_down})
    if len(bundles) > 2:
        raise UsageError(f"{len(bundles)} bundles", hint="bench one, or two that are to be compared")
    plan = Plan(
        inferences=inferences,
        rounds=1 if len(bundles) == 1 else _ROUNDS,
        cool_down_s=300 if cool_down is None else cool_down,
        op_profile=op_profile,
        sustained_minutes=sustained or 0,
        loops=_loops(loop),
    )
    with ExitStack() as stack:
        jobs = []
        for index, bundle in enumerate(bundles):
            folder, manifest = stack.enter_context(opened_bundle(bundle))
            if runner is RunnerName.SIM:
                made = _simulator(manifest, soc)
            elif runner is RunnerName.ORT:
                made = _board(manifest)
            else:
                remote = (remote_dir or "/data/local/tmp/sdconvert") + ("/second" if index else "")
                made = _phone(manifest, qairt_sdk, serial or "", adb, remote)
            jobs.append(Job(folder, manifest, made))
        _run(ctx.obj, jobs, out, plan)


def _loops(asked: Loop | None) -> "tuple[LoopMode, ...] | None":
    modes: tuple[LoopMode, ...] = ("closed", "teacher-forced")
    return None if asked is None else tuple(mode for mode in modes if asked in (mode, Loop.BOTH))


def _refuse_idle(runner: RunnerName, phone: dict[str, Any], simulator: dict[str, Any], device: dict[str, Any]) -> None:
    from sdconvert.errors import UsageError

    idle = {
        RunnerName.QNN_NET_RUN: simulator,
        RunnerName.ORT: phone | simulator,
        RunnerName.SIM: phone | device,
    }[runner]
    if given := [name for name, value in idle.items() if value is not None]:
        raise UsageError(f"{', '.join(given)} has no effect with --runner {runner}", hint="leave it out")


def _run(session: Session, jobs: "list[Job]", out: Path, plan: "Plan") -> None:
    from sdconvert.android.bench import bench as run_bench
    from sdconvert.android.bench import require_valid
    from sdconvert.android.compare import check_bundles, compare, write_comparison

    if len(jobs) == 1:
        results = run_bench(jobs, [out], plan)
        session.show({**results[0], "out": str(out)}, *_blocks(results[0]), f"result: {out / 'bench.json'}")
    else:
        check_bundles(jobs)
        results = run_bench(jobs, [out / "a", out / "b"], plan)
        comparison = compare(*results)
        write_comparison(comparison, out)
        shown = [block for result in results for block in _blocks(result)]
        data = {"results": results, "comparison": comparison, "out": str(out)}
        session.show(data, *shown, *comparison_blocks(comparison), f"result: {out / 'compare.json'}")
    require_valid(results)


def _blocks(result: dict[str, Any]) -> list["Table | str"]:
    from sdconvert.android.bench import bench_columns, bench_rows

    columns = bench_columns(result)
    return [f"{result['model']} on {result['soc']}", *result["notes"], Table(columns, bench_rows(result), columns[1:])]


def _simulator(manifest: "Manifest", name: str | None) -> "Runner":
    from sdconvert.android.runners import SimulatorRunner
    from sdconvert.errors import UsageError
    from sdconvert.qnn.simulator import Simulator

    socs = [soc.name for soc in manifest.socs]
    if name is not None and name not in socs:
        raise UsageError(f"the bundle is for {', '.join(socs)}, not for {name}", hint="choose one of these with --soc")
    return SimulatorRunner(name or socs[0], Simulator)


def _board(manifest: "Manifest") -> "Runner":
    from sdconvert.android.board import BoardRunner, choose_board_soc
    from sdconvert.qnn.npu import load_on_npu, require_npu

    require_npu()
    return BoardRunner(choose_board_soc(manifest), load_on_npu)


def _phone(manifest: "Manifest", sdk: Path | None, serial: str, adb: Path | None, remote: str) -> "Runner":
    from sdconvert.android.adb import find_adb
    from sdconvert.android.device import ask_phone, choose_soc, find_device
    from sdconvert.android.runners import PhoneRunner
    from sdconvert.android.sdk import sdk_files
    from sdconvert.errors import UsageError

    if sdk is None:
        raise UsageError(
            "the runner on the phone comes from the QAIRT SDK, which sdconvert may not ship",
            hint="give its folder with --qairt-sdk, or use --runner sim",
        )
    client = find_device(find_adb(adb), serial)
    phone = ask_phone(client, remote)
    soc = choose_soc(manifest, phone)
    viewer = sdk / "bin/x86_64-linux-clang/qnn-profile-viewer"
    files = sdk_files(sdk, phone.soc.name, manifest.qairt)
    return PhoneRunner(client, phone, soc, files, viewer if viewer.is_file() else None, remote)
