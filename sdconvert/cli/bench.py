"""`sdconvert bench`: run a bundle on a phone or in the simulator, and score it."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdconvert.cli.session import Session, Table

if TYPE_CHECKING:
    from sdconvert.android.manifest import Manifest
    from sdconvert.android.runners import Runner


class RunnerName(StrEnum):
    """Who runs the graphs."""

    QNN_NET_RUN = "qnn-net-run"
    SIM = "sim"


def bench(
    ctx: typer.Context,
    bundles: Annotated[
        list[Path], typer.Argument(help="Folder of a bundle, such as build/pasd_tiny/70-android/bundle; or of two.")
    ],
    runner: Annotated[RunnerName, typer.Option(help="On an Android phone, or in the simulator here.")] = (
        RunnerName.QNN_NET_RUN
    ),
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
) -> None:
    """Run a bundle and compare its answers with those expected.

    Only what changed is sent to the phone. `bench.json` keeps every time as it was taken; the simulator's times are no
    figure of a device.
    """
    from sdconvert.android.bench import bench as run_bench
    from sdconvert.android.bench import bench_columns, bench_rows, require_valid
    from sdconvert.android.measure import Job
    from sdconvert.android.timing import Plan
    from sdconvert.android.verify import verify_bundle
    from sdconvert.errors import UsageError

    for_phones: dict[str, object] = {
        "--qairt-sdk": qairt_sdk,
        "--serial": serial,
        "--adb": adb,
        "--remote-dir": remote_dir,
        "--cool-down": cool_down,
        "--op-profile": op_profile or None,
        "--sustained": sustained,
    }
    idle = for_phones if runner is RunnerName.SIM else {"--soc": soc}
    if given := [name for name, value in idle.items() if value is not None]:
        raise UsageError(f"{', '.join(given)} has no effect with --runner {runner}", hint="leave it out")
    [bundle] = bundles
    if bundle.is_file():
        raise UsageError(f"`{bundle}` is no folder", hint="unpack the tar: `tar xf`")
    manifest = verify_bundle(bundle)
    made = (
        _simulator(manifest, soc)
        if runner is RunnerName.SIM
        else _phone(manifest, qairt_sdk, serial or "", adb, remote_dir or "/data/local/tmp/sdconvert")
    )
    plan = Plan(
        inferences=inferences,
        cool_down_s=300 if cool_down is None else cool_down,
        op_profile=op_profile,
        sustained_minutes=sustained or 0,
    )
    [result] = run_bench([Job(bundle, manifest, made)], [out], plan)
    columns = bench_columns(result)
    session: Session = ctx.obj
    session.show(
        {**result, "out": str(out)},
        *result["notes"],
        Table(columns, bench_rows(result), right=columns[1:]),
        f"result: {out / 'bench.json'}",
    )
    require_valid([result])


def _simulator(manifest: "Manifest", name: str | None) -> "Runner":
    from sdconvert.android.runners import SimulatorRunner
    from sdconvert.errors import UsageError
    from sdconvert.qnn.simulator import Simulator

    socs = [soc.name for soc in manifest.socs]
    if name is not None and name not in socs:
        raise UsageError(f"the bundle is for {', '.join(socs)}, not for {name}", hint="choose one of these with --soc")
    return SimulatorRunner(name or socs[0], Simulator)


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
