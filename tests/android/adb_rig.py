"""The real adb clients for tests, each with a server of its own port, and phones connected to it."""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from phone import Phone


def bundled_adb() -> Path:
    """Return the client that the package adbutils carries."""
    package = find_spec("adbutils")
    assert package and package.origin
    return Path(package.origin).parent / "binaries" / "adb"


def adb_version(binary: Path) -> str:
    said = subprocess.run([binary, "version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"Version (\S+)", said)[0]


def other_adb() -> Path | None:
    """Return the client on PATH, if it is of another version than the bundled one."""
    found = shutil.which("adb")
    return Path(found) if found and adb_version(Path(found)) != adb_version(bundled_adb()) else None


def adb_environment(folder: Path) -> dict[str, str]:
    """Return the variables for a server that sees no device but those connected to it, and has its keys in `folder`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return {
        "ANDROID_ADB_SERVER_PORT": str(port),
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "ADB_USB": "0",
        "ADB_EMU": "0",
        "ADB_MDNS_OPENSCREEN": "0",
        "ADB_MDNS_AUTO_CONNECT": "",
    }


class Rig:
    """Makes phones and connects them; the variables of `environment` have to be set for the code under test too."""

    def __init__(self, binary: Path, environment: dict[str, str], folder: Path) -> None:
        self.binary, self._folder = binary, folder
        self._environment = {**os.environ, **environment}
        self._phones: list[Phone] = []

    def adb(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.binary, *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            **options,
        )

    def phone(self, root: Path | None = None, **about: Any) -> Phone:
        phone = Phone(root or self._folder / f"phone{len(self._phones)}", **about)
        self._phones.append(phone)
        self.connect(phone)
        return phone

    def connect(self, phone: Phone) -> None:
        self.adb("connect", phone.daemon.serial)

    def replug(self, phone: Phone) -> None:
        """Plug a phone in again, and wait until adb has it."""
        phone.daemon.plug()
        self.connect(phone)
        serial = phone.daemon.serial
        until(lambda: self.adb("-s", serial, "get-state").stdout.strip() == "device")

    def kill_server(self) -> None:
        self.adb("kill-server")

    def close(self) -> None:
        for phone in self._phones:
            phone.close()
        self.adb("disconnect")


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for something that happens soon."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
