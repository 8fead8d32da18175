"""Android's own client `adb`, one process per request, and what its answers mean.

The exit code of `adb` says little: `adb shell` of version 29 ends with 0 when the cable is pulled in the middle, and
`adb push` may count a file as pushed that did not arrive. So each command in the device's shell prints a last line with
its own exit code, and an answer without that line is none. What was pushed is believed once its checksum was read back.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sdconvert.errors import (
    DeviceError,
    DeviceFullError,
    DeviceLostError,
    DeviceTimeoutError,
    EnvironmentProblem,
    UsageError,
)
from sdconvert.io.files import disk_full

_END = re.compile(r"sdconvert-exit=(\d+)\r?\n\Z")
_FULL = "No space left on device"
_GONE = re.compile(
    r"device .*not found|no devices|device offline|couldn't read from device|failed to read copy response|"
    r"protocol fault|connection reset|broken pipe|cannot connect to daemon|closed|EOF",
    re.IGNORECASE,
)
_AGAIN = "check the cable and the phone's screen, then run the same command again: it goes on from there"


@dataclass(frozen=True)
class ShellAnswer:
    """What a command in the device's shell printed, and its exit code."""

    code: int
    out: str
    err: str


def find_adb(given: Path | None = None) -> Path:
    """Return the `adb` to use: the one given, else that on PATH, else that in the package adbutils.

    Raises:
        UsageError: The one given is no file.
        EnvironmentProblem: There is none.
    """
    if given:
        if not given.is_file():
            raise UsageError(f"no adb at `{given}`", hint="give the path of the program itself")
        return given
    if found := shutil.which("adb"):
        return Path(found)
    # Found, not imported: only its program is wanted.
    package = find_spec("adbutils")
    bundled = Path(package.origin).parent / "binaries" / "adb" if package and package.origin else None
    if bundled and bundled.is_file():
        return bundled
    raise EnvironmentProblem(
        "the program `adb` is not installed",
        hint="install Android's platform tools, or `pip install adbutils`, or give its path with --adb",
    )


@dataclass(frozen=True)
class Adb:
    """The client for one device.

    Args:
        binary: The program.
        serial: The device, as `adb devices` calls it.
    """

    binary: Path
    serial: str = ""

    def call(self, *arguments: str, timeout_s: float, doing: str) -> subprocess.CompletedProcess[str]:
        """Run `adb` and return what it said, whatever its exit code.

        Raises:
            DeviceTimeoutError: It did not end in time; it was killed.
            EnvironmentProblem: The program cannot be run.
        """
        command = [str(self.binary), *(["-s", self.serial] if self.serial else []), *arguments]
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise DeviceTimeoutError(
                f"{self._name} did not answer within {timeout_s:g} s while {doing}{_last_line(error.stdout)}",
                hint="look whether the phone is locked up or asleep; restart it, then run the same command again",
            ) from error
        except OSError as error:
            raise EnvironmentProblem(
                f"`{self.binary}` cannot be run: {error.strerror}", hint="give another one with --adb"
            ) from error

    def shell(self, command: str, *, timeout_s: float, doing: str) -> ShellAnswer:
        """Run a command in the device's shell to its end.

        Args:
            command: POSIX shell.
            timeout_s: How long it may take.
            doing: What a message says was going on, such as "the bundle was pushed".

        Raises:
            DeviceLostError: The answer is not whole.
            DeviceTimeoutError: It did not end in time.
        """
        # When the connection ends, adbd hangs up on the outer shell alone; what it runs has to be told.
        script = f"({command}\n) & p=$!; trap 'kill -HUP $p; exit 129' HUP; wait $p; echo sdconvert-exit=$?"
        done = self.call("shell", script, timeout_s=timeout_s, doing=doing)
        end = _END.search(done.stdout)
        if not end:
            raise self.lost(doing, done)
        return ShellAnswer(int(end[1]), done.stdout[: end.start()], done.stderr)

    def shell_ok(self, command: str, *, timeout_s: float, doing: str) -> str:
        """Run a command that must succeed, and return its output.

        Raises:
            DeviceFullError: The device has no room left.
            DeviceError: It failed, or as `shell`.
        """
        answer = self.shell(command, timeout_s=timeout_s, doing=doing)
        if answer.code:
            raise self._failed(doing, f"{answer.err}{answer.out}")
        return answer.out

    def push(self, files: Sequence[Path], folder: str, *, timeout_s: float) -> None:
        """Send files into an existing folder of the device.

        Raises:
            DeviceFullError: The device has no room left.
            DeviceLostError: The connection broke.
            DeviceError: adb says why not, or as `call`.
        """
        doing = "files were sent"
        # adb takes what begins with `-` for an option; an absolute path does not.
        names = [str(file.absolute()) for file in files]
        done = self.call("push", *names, f"{folder}/", timeout_s=timeout_s, doing=doing)
        if done.returncode:
            raise self._failed(doing, done.stderr + done.stdout)

    def pull(self, remote: str, local: Path, *, timeout_s: float) -> None:
        """Fetch a file or folder; `local` must not exist yet.

        Raises:
            EnvironmentProblem: The disk of this computer is full.
            DeviceLostError: The connection broke.
            DeviceError: adb says why not, or as `call`.
        """
        doing = "results were fetched"
        done = self.call("pull", remote, str(local.absolute()), timeout_s=timeout_s, doing=doing)
        if done.returncode:
            said = done.stderr + done.stdout
            raise disk_full(local.parent) if _FULL in said else self._failed(doing, said)

    def lost(self, doing: str, done: subprocess.CompletedProcess[str]) -> DeviceError:
        """Make the error for an answer that is not whole."""
        if "unauthorized" in done.stderr:
            return DeviceError(f"{self._name} no longer allows this computer in", hint="accept the dialog on the phone")
        said = _shown(done.stderr) if done.stderr.strip() else f"adb ended with {done.returncode}"
        return DeviceLostError(
            f"the connection to {self._name} broke while {doing} ({said}){_last_line(done.stdout)}", hint=_AGAIN
        )

    def _failed(self, doing: str, said: str) -> DeviceError:
        if _FULL in said:
            return DeviceFullError(
                f"{self._name} ran out of space while {doing}",
                hint="free some space on the phone and run the same command again: it goes on from there",
            )
        if _GONE.search(said) or not self._answers():
            return DeviceLostError(f"the connection to {self._name} broke while {doing} ({_shown(said)})", hint=_AGAIN)
        return DeviceError(f"{self._name} refused while {doing}: {_shown(said)}", hint="the text is the device's own")

    def _answers(self) -> bool:
        # A pull that breaks off may end without a word of why.
        return self.call("get-state", timeout_s=10, doing="its state was asked for").stdout.strip() == "device"

    @property
    def _name(self) -> str:
        return f"device `{self.serial}`" if self.serial else "adb"


def quoted(*words: str) -> str:
    """Return words as the device's shell reads them back."""
    return " ".join(shlex.quote(word) for word in words)


def _shown(said: str) -> str:
    # Progress, `[ 42%] name`, says nothing of what went wrong.
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("[")]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it does not say why"])[0]


def _last_line(output: str | bytes | None) -> str:
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    lines = text.split("\n")
    # What follows the last newline may be half a line.
    return f"; its last words were `{lines[-2]}`" if len(lines) > 1 else ""
