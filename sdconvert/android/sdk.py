"""Qualcomm's runner and libraries, taken from the user's own QAIRT SDK; sdconvert ships none of them.

    bin/aarch64-android/qnn-net-run
    lib/aarch64-android/libQnnHtp.so, libQnnSystem.so, libQnnHtpNetRunExtensions.so, libQnnHtpV75Stub.so
    lib/hexagon-v75/unsigned/libQnnHtpV75Skel.so

A phone reports a library of the wrong kind by a number, long after it was sent; what can be read off the files is
refused here. The layout is that of the public SDK.
"""

import re
import struct
from pathlib import Path

from sdconvert.android.push import LocalFile, local_file
from sdconvert.errors import UsageError
from sdconvert.soc import find_soc

_AARCH64, _HEXAGON = 183, 164  # e_machine
_BUILD = re.compile(rb"v(\d+\.\d+\.\d+\.\d{12})")
_HINT = "download the SDK that the bundle names and give its folder with --qairt-sdk"


def sdk_files(sdk: Path, soc: str, qairt: str) -> dict[str, LocalFile]:
    """Return what has to be on an Android phone beside a bundle, by path there.

    Args:
        sdk: The unpacked SDK, the folder with `bin` and `lib`.
        soc: Name of the phone's SoC.
        qairt: Build of the compiler that made the bundle, such as `2.51.0.260929181845`.

    Raises:
        UsageError: A file is missing, is of another system or Hexagon generation, the files are of several builds, or
            they are older than the bundle.
    """
    arch = find_soc(soc).arch
    found = {
        "bin/qnn-net-run": sdk / "bin/aarch64-android/qnn-net-run",
        **{
            f"lib/{name}": sdk / "lib/aarch64-android" / name
            for name in ("libQnnHtp.so", "libQnnSystem.so", "libQnnHtpNetRunExtensions.so", f"libQnnHtpV{arch}Stub.so")
        },
        f"lib/libQnnHtpV{arch}Skel.so": sdk / f"lib/hexagon-v{arch}/unsigned/libQnnHtpV{arch}Skel.so",
    }
    if missing := [str(path.relative_to(sdk)) for path in found.values() if not path.is_file()]:
        raise UsageError(f"QAIRT SDK `{sdk}` has no {', '.join(missing)}", hint=_HINT)
    contents = {path: path.read_bytes() for path in found.values()}
    for path, content in contents.items():
        _check_kind(path, content, arch)
    builds = {path.name: match[1].decode() for path, content in contents.items() if (match := _BUILD.search(content))}
    _check_builds(sdk, builds, qairt)
    return {name: local_file(path) for name, path in found.items()}


def _check_kind(path: Path, content: bytes, arch: int) -> None:
    is_skel = path.name.endswith("Skel.so")
    if content[:4] != b"\x7fELF" or len(content) < 64:
        raise UsageError(f"`{path}` is no library or program", hint=_HINT)
    machine = struct.unpack_from("<H", content, 18)[0]
    wanted, system = (_HEXAGON, "Hexagon") if is_skel else (_AARCH64, "aarch64")
    if machine != wanted:
        raise UsageError(f"`{path}` is for machine {machine}, not for {system} ({wanted})", hint=_HINT)
    if is_skel:
        # ELF32; the lowest byte of the flags is the generation, read as it is written: 0x75 for V75.
        flags = f"{struct.unpack_from('<I', content, 36)[0] & 0xFF:x}"
        if flags != str(arch):
            raise UsageError(f"`{path}` is for Hexagon V{flags}, not for V{arch}", hint=_HINT)
    elif b"\0libc.so.6\0" in content:
        raise UsageError(f"`{path}` is for Linux with glibc, not for Android", hint=_HINT)


def _check_builds(sdk: Path, builds: dict[str, str], qairt: str) -> None:
    if len(set(builds.values())) > 1:
        told = ", ".join(f"{name} {build}" for name, build in sorted(builds.items()))
        raise UsageError(f"the libraries of `{sdk}` are of several builds: {told}", hint=_HINT)
    if "libQnnHtp.so" not in builds:
        raise UsageError(f"libQnnHtp.so of `{sdk}` names no QAIRT build", hint=_HINT)
    build = builds["libQnnHtp.so"]
    if _number(build) < _number(qairt):
        raise UsageError(
            f"QAIRT SDK `{sdk}` is {build}, older than {qairt}, which compiled the bundle",
            hint="a runtime loads contexts of its own build and older ones: take an SDK of that build or later",
        )


def _number(build: str) -> tuple[int, ...]:
    return tuple(int(part) for part in build.split("."))
