"""`sdconvert doctor`: what this machine has and lacks for a conversion."""

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from sdconvert.cli.session import Session, Table, amount
from sdconvert.errors import EnvironmentProblem

_DISK_BYTES = 2 << 30  # one run of pasd_tiny, with room to spare
_MEMORY_BYTES = 6 << 30


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    found: str
    hint: str = ""


def doctor(
    ctx: typer.Context, build: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("build")
) -> None:
    """Check whether this machine is ready.

    Looks at Python, packages, disk, memory and the QNN libraries; exit code 3 if something is missing.
    """
    checks = [_python(), *_packages(), _qnn(), _disk(build), _memory()]
    session: Session = ctx.obj
    rows = [(check.name, "ok" if check.ok else "no", check.found) for check in checks]
    session.show({"checks": [asdict(check) for check in checks]}, Table(("check", "state", "found"), rows))
    if failed := [check for check in checks if not check.ok]:
        raise EnvironmentProblem(
            f"not ready: {', '.join(check.name for check in failed)}",
            hint="; ".join(dict.fromkeys(check.hint for check in failed)),
        )


def _python() -> Check:
    ok = sys.version_info >= (3, 11)
    return Check("python", ok, f"{platform.python_version()} on {platform.platform()}", "install Python 3.11 or newer")


def _packages() -> Iterator[Check]:
    """Compare what sdconvert requires with what is installed."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    try:
        wanted = requires("sdconvert") or []
    except PackageNotFoundError:
        yield Check("sdconvert", False, "not installed, runs from its source", "run `make setup`")
        return
    for line in wanted:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "not installed"
        ok = found != "not installed" and requirement.specifier.contains(found, prereleases=True)
        yield Check(requirement.name, ok, f"{found} (wanted {requirement.specifier or 'any'})", "run `make setup`")


def _qnn() -> Check:
    # Only looked up: importing it would load the libraries.
    spec = find_spec("onnxruntime_qnn")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    found = sorted(file.name for file in folder.rglob("lib*.so")) if folder else []
    ok = {"libQnnHtp.so", "libHtpPrepare.so"} <= set(found)
    return Check(
        "QNN libraries", ok, f"{len(found)} in {folder}" if folder else "none", "run `make setup` on Linux x86-64"
    )


def _disk(build: Path) -> Check:
    folder = build.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return Check("disk", free >= _DISK_BYTES, f"{amount(free)} free for {build}", "free 2 GiB, or use --build DIR")


def _memory() -> Check:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    free = int(match[1]) * 1024 if match else total
    return Check("memory", free >= _MEMORY_BYTES, f"{amount(free)} free of {amount(total)}", "free 6 GiB of memory")
