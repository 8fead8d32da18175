"""Libraries that a phone would refuse by a number are refused here by name.

The files are headers and build strings alone: Qualcomm's own for Android cannot be had without their SDK.
"""

import struct
from collections.abc import Callable
from pathlib import Path

import onnxruntime_qnn
import pytest

from sdconvert.android.sdk import sdk_files
from sdconvert.errors import UsageError

BUILD = "2.51.0.260929181845"
STUB, SKEL = "lib/aarch64-android/libQnnHtpV75Stub.so", "lib/hexagon-v75/unsigned/libQnnHtpV75Skel.so"
HTP, RUNNER = "lib/aarch64-android/libQnnHtp.so", "bin/aarch64-android/qnn-net-run"
SYSTEM, EXTENSIONS = "lib/aarch64-android/libQnnSystem.so", "lib/aarch64-android/libQnnHtpNetRunExtensions.so"


def elf(machine: int, *, flags: int = 0, text: bytes = b"") -> bytes:
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<H", header, 18, machine)
    struct.pack_into("<I", header, 36, flags)
    return bytes(header) + text


@pytest.fixture
def sdk(tmp_path: Path) -> Path:
    build = f"AISW_VERSION v{BUILD}\0".encode()
    contents = {name: elf(183, text=build) for name in (STUB, HTP, SYSTEM)} | {SKEL: elf(164, flags=0x75, text=build)}
    for name, content in {**contents, RUNNER: elf(183), EXTENSIONS: elf(183)}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_a_phone_gets_the_libraries_of_its_generation(sdk: Path) -> None:
    assert set(sdk_files(sdk, "SM8650", BUILD)) == {
        "bin/qnn-net-run",
        *(f"lib/libQnn{name}.so" for name in ("Htp", "System", "HtpNetRunExtensions", "HtpV75Stub", "HtpV75Skel")),
    }


def test_a_newer_runtime_is_taken(sdk: Path) -> None:
    assert sdk_files(sdk, "SM8650", "2.9.0.240101000000")


def test_libraries_of_another_generation_are_missed(sdk: Path) -> None:
    with pytest.raises(UsageError, match=r"has no lib/aarch64-android/libQnnHtpV79Stub\.so, lib/hexagon-v79/unsigned"):
        sdk_files(sdk, "SM8750", BUILD)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (SKEL, lambda old: elf(164, flags=0x73), "is for Hexagon V73, not for V75"),
        (SKEL, lambda old: elf(183), r"is for machine 183, not for Hexagon \(164\)"),
        (HTP, lambda old: elf(62), r"is for machine 62, not for aarch64 \(183\)"),
        (HTP, lambda old: old + b"\0libc.so.6\0", "is for Linux with glibc"),
        (HTP, lambda old: elf(183), "names no QAIRT build"),
        (RUNNER, lambda old: b"#!/bin/sh\n" + bytes(100), "is no library or program"),
        (RUNNER, lambda old: b"", "is no library or program"),
        (STUB, lambda old: old.replace(b"2.51.0", b"2.50.0"), r"several builds: .*Stub\.so 2\.50\.0"),
    ],
)
def test_what_a_phone_would_refuse(sdk: Path, name: str, change: Callable[[bytes], bytes], message: str) -> None:
    path = sdk / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UsageError, match=message) as caught:
        sdk_files(sdk, "SM8650", BUILD)
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_an_older_runtime_is_refused(sdk: Path) -> None:
    with pytest.raises(UsageError, match=r"is 2\.51\.0\.260929181845, older than 2\.52\.0\.261101000000"):
        sdk_files(sdk, "SM8650", "2.52.0.261101000000")


def test_the_libraries_of_this_computer_are_refused(sdk: Path) -> None:
    real = Path(onnxruntime_qnn.__file__).with_name("libQnnHtp.so")
    (sdk / HTP).unlink()
    (sdk / HTP).symlink_to(real)
    with pytest.raises(UsageError, match="is for machine 62"):
        sdk_files(sdk, "SM8650", BUILD)
