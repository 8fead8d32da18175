"""Find the one phone that is meant, and ask it whether it can run a bundle, before anything is sent."""

import re
from dataclasses import dataclass
from pathlib import Path

from sdconvert.android.adb import Adb, quoted
from sdconvert.android.manifest import Manifest
from sdconvert.errors import DeviceError, UsageError
from sdconvert.soc import Soc, find_soc

_ASK_S = 20.0
_LINE = re.compile(r"^(\S+)\s+(no permissions|\S+)(.*)$")
_ABI = "arm64-v8a"
_STATES = {
    "unauthorized": ("has not allowed this computer in", "unlock the phone and accept `Allow USB debugging?`"),
    "authorizing": ("has not allowed this computer in yet", "unlock the phone and accept `Allow USB debugging?`"),
    "offline": ("is offline: it is known to adb, but does not answer", "pull the cable and plug it in again"),
    "connecting": ("is still connecting", "wait a moment and run the same command again"),
    "no permissions": (
        "may not be opened by this user",
        "add the phone to the udev rules (https://developer.android.com/studio/run/device), or run the server as root",
    ),
    "recovery": ("is in recovery mode", "start Android on it"),
    "sideload": ("is in sideload mode", "start Android on it"),
    "bootloader": ("is in its bootloader", "start Android on it"),
}
_NONE_HINT = "connect a phone, switch on USB debugging in its developer options, and see `adb devices`"


@dataclass(frozen=True)
class Listed:
    """One line of `adb devices -l`."""

    serial: str
    state: str
    about: str


@dataclass(frozen=True)
class Phone:
    """What a phone says of itself; sizes in bytes, temperature in degrees Celsius."""

    serial: str
    model: str
    android: str
    soc: Soc
    soc_id: str
    """The kernel's number of the SoC, which is another numbering than QNN's."""
    free_bytes: int
    battery_percent: int | None
    battery_celsius: float | None
    thermal_status: int | None
    """0 none, 1 light, 2 moderate, 3 severe, above that critical to shutdown; Android's own scale."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What makes latencies doubtful; accuracy does not depend on it."""
        found = []
        if self.thermal_status:
            found.append(f"the phone is warm (thermal status {self.thermal_status}) and may run slower than it can")
        if self.battery_percent is not None and self.battery_percent < 20:
            found.append(f"the battery is at {self.battery_percent} %: many phones lower their clocks then")
        return tuple(found)


def list_devices(binary: Path) -> tuple[Listed, ...]:
    """Return every device that adb knows, in whatever state.

    Raises:
        DeviceError: adb cannot say, or as `Adb.call`.
    """
    doing = "devices were listed"
    done = Adb(binary).call("devices", "-l", timeout_s=_ASK_S, doing=doing)
    _, header, lines = done.stdout.partition("List of devices attached")
    if not header:
        raise Adb(binary).lost(doing, done)
    found = (_LINE.match(line) for line in lines.splitlines())
    return tuple(Listed(match[1], match[2], match[3].strip()) for match in found if match)


def find_device(binary: Path, serial: str = "") -> Adb:
    """Return the client for the device called `serial`, or for the only one.

    Raises:
        UsageError: There are several, and no serial says which.
        DeviceError: There is none, none of that serial, or it is in a state that no command reaches.
    """
    listed = list_devices(binary)
    known = ", ".join(f"`{device.serial}` ({device.state})" for device in listed)
    if serial:
        listed = tuple(device for device in listed if device.serial == serial)
        if not listed:
            raise DeviceError(
                f"no device `{serial}` is connected", hint=f"connected are {known}" if known else _NONE_HINT
            )
    if not listed:
        raise DeviceError("no Android device is connected", hint=_NONE_HINT)
    if len(listed) > 1:
        raise UsageError(f"{len(listed)} devices are connected: {known}", hint="say which with --serial")
    device = listed[0]
    if device.state != "device":
        said, hint = _STATES.get(device.state, (f"is in the state `{device.state}`", "start Android on it"))
        raise DeviceError(f"device `{device.serial}` {said}", hint=hint)
    return Adb(binary, device.serial)


def ask_phone(adb: Adb, remote: str) -> Phone:
    """Ask a device what it is and how it is; creates the folder `remote` there.

    Raises:
        DeviceError: It is no phone with a Hexagon NPU that sdconvert knows, the folder cannot be made, or it does not
            answer.
    """
    adb.shell_ok(quoted("mkdir", "-p", remote), timeout_s=_ASK_S, doing=f"the folder {remote} was made")
    asked = {
        "soc": "getprop ro.soc.model",
        "model": "getprop ro.product.model",
        "abi": "getprop ro.product.cpu.abi",
        "android": "getprop ro.build.version.release",
        "soc_id": "cat /sys/devices/soc0/soc_id",
        "battery": "dumpsys battery",
        "thermal": "dumpsys thermalservice",
    }
    script = "\n".join(f"echo; echo sdconvert-ask={key}; {command} 2>/dev/null" for key, command in asked.items())
    answer = adb.shell(script, timeout_s=_ASK_S, doing="the phone was asked what it is")
    parts = re.split(r"^sdconvert-ask=(\w+)\r?\n", answer.out, flags=re.MULTILINE)
    said = {key: text.strip() for key, text in zip(parts[1::2], parts[2::2], strict=True)}
    if said["abi"] != _ABI:
        raise DeviceError(f"device `{adb.serial}` is {said['abi'] or 'of unknown architecture'}", hint=f"needs {_ABI}")
    celsius = _number(r"^\s*temperature: (-?\d+)", said["battery"])
    return Phone(
        serial=adb.serial,
        model=said["model"],
        android=said["android"],
        soc=_soc(adb.serial, said["soc"], said["soc_id"]),
        soc_id=said["soc_id"],
        free_bytes=free_bytes(adb, remote),
        battery_percent=_number(r"^\s*level: (\d+)", said["battery"]),
        battery_celsius=None if celsius is None else celsius / 10,  # Android counts tenths
        thermal_status=_number(r"^\s*Thermal Status: (\d+)", said["thermal"]),
    )


def free_bytes(adb: Adb, remote: str) -> int:
    """Return how many bytes fit into a folder of the device.

    Raises:
        DeviceError: `df` there says nothing that can be read.
    """
    text = adb.shell_ok(quoted("df", "-k", remote), timeout_s=_ASK_S, doing="free space was asked for")
    header, _, line = text.strip().partition("\n")
    columns, values = header.split(), line.split()
    if "Available" not in columns or len(values) < len(columns) - 1:
        raise DeviceError(f"device `{adb.serial}` does not tell its free space", hint=f"`df -k {remote}`: {text!r}")
    return int(values[columns.index("Available")]) * 1024


def choose_soc(manifest: Manifest, phone: Phone) -> str:
    """Return the SoC of the bundle whose contexts this phone runs.

    Raises:
        UsageError: There is none.
    """
    for soc in manifest.socs:
        if soc.soc_model == phone.soc.soc_model:
            return soc.name
    there = ", ".join(soc.name for soc in manifest.socs)
    raise UsageError(
        f"the bundle is for {there}; device `{phone.serial}` ({phone.model}) has {phone.soc.name}",
        hint=f"compile for it too: `sdconvert package --soc {phone.soc.name}`",
    )


def _soc(serial: str, name: str, soc_id: str) -> Soc:
    if not name:
        raise DeviceError(
            f"device `{serial}` does not say what SoC it has (soc_id {soc_id or 'unknown'})",
            hint="`ro.soc.model` is there from Android 12 on: update the phone",
        )
    try:
        return find_soc(name)
    except UsageError as error:
        raise DeviceError(
            f"device `{serial}` has no NPU that sdconvert knows: {error.args[0]}", hint=error.hint
        ) from error


def _number(pattern: str, text: str) -> int | None:
    match = re.search(pattern, text, re.MULTILINE)
    return int(match[1]) if match else None
