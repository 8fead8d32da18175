"""Bring a bundle to a phone: only what is missing there, and nothing that is half valid.

    REMOTE/bundle/            complete, if its manifest.json is there
    REMOTE/bundle/.incoming/  what has been sent, until the checksums of all of it were read back

The phone computes the checksums. A file is renamed into place once it is known to be right; manifest.json is removed
first and comes last. After an interruption, files that arrived whole are found by their checksums and not sent again.
"""

import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sdconvert.android.adb import Adb, quoted
from sdconvert.android.device import free_bytes
from sdconvert.android.manifest import BUNDLE_PATH, Manifest
from sdconvert.errors import DeviceError, DeviceFullError, UsageError
from sdconvert.io.files import sha256_file

INCOMING = ".incoming"
_LAST = "manifest.json"
_REMOTE = r"(/[A-Za-z0-9_][A-Za-z0-9_.+-]*){2,}"
_SUM = re.compile(r"^([0-9a-f]{64}) [ *]\./(.+)$", re.MULTILINE)
_ARGUMENT_BYTES = 16_000
_SHORT_S = 30.0
_SLOWEST = 2_000_000
"""Bytes per second below which a phone or its cable counts as hung."""


@dataclass(frozen=True)
class LocalFile:
    """A file to send."""

    path: Path
    sha256: str
    nbytes: int


@dataclass(frozen=True)
class PushReport:
    """What a push did."""

    sent_files: int
    sent_bytes: int
    kept_files: int
    removed_files: int


def device_files(bundle: Path, manifest: Manifest, soc: str) -> dict[str, LocalFile]:
    """Return what a phone with that SoC needs of a bundle: its contexts, the inputs and their lists.

    Raises:
        UsageError: A file lies outside the bundle.
    """
    contexts = {graph.context for graph in manifest.graphs if graph.soc == soc}
    wanted = [
        name for name, record in manifest.files.items() if name in contexts or record.role in ("input", "input_list")
    ]
    files = {name: LocalFile(bundle / name, manifest.files[name].sha256, manifest.files[name].bytes) for name in wanted}
    files[_LAST] = local_file(bundle / _LAST)
    for name, file in files.items():
        if not file.path.resolve().is_relative_to(bundle.resolve()):
            raise UsageError(f"`{name}` of bundle `{bundle}` leads out of it", hint="package it again")
    return files


def local_file(path: Path) -> LocalFile:
    """Return a file as it is now, to be sent beside a bundle.

    Raises:
        UsageError: There is no such file.
    """
    if not path.is_file():
        raise UsageError(f"no file at `{path}`", hint="it is to be sent to the phone")
    return LocalFile(path, sha256_file(path), path.stat().st_size)


def push(adb: Adb, files: Mapping[str, LocalFile], remote: str) -> PushReport:
    """Make the folder `bundle` in `remote` hold exactly `files`; what is there already is not sent.

    Args:
        adb: The device.
        files: By path in the bundle, with its `manifest.json`. A `sums.txt` over all of them comes along.
        remote: Absolute folder on the device.

    Raises:
        UsageError: A name could lead out of the bundle, or a file is not what the manifest says.
        DeviceFullError: There is not enough room.
        DeviceError: Something did not arrive as it was sent, or as `Adb.shell` and `Adb.push`.
    """
    _check_names(files, remote)
    with tempfile.TemporaryDirectory(prefix="sdconvert-") as scratch:
        sums = Path(scratch) / "sums.txt"
        sums.write_text("".join(f"{files[name].sha256}  {name}\n" for name in sorted(files)))
        return _Push(adb, {**files, sums.name: local_file(sums)}, f"{remote}/bundle").run()


class _Push:
    def __init__(self, adb: Adb, files: Mapping[str, LocalFile], folder: str) -> None:
        self._adb, self._files, self._folder = adb, files, folder

    def run(self) -> PushReport:
        there = self._sums()
        missing = [name for name, file in self._files.items() if there.get(name) != file.sha256]
        foreign = [name for name in there if name not in self._files]
        if not missing and not foreign:
            return PushReport(0, 0, len(self._files), 0)
        arrived = [name for name in missing if there.get(f"{INCOMING}/{name}") == self._files[name].sha256]
        unsent = [name for name in missing if name not in arrived]
        # From here on the folder is not complete, and says so.
        self._shell([f"rm -f {_LAST}"])
        if _LAST not in missing:
            missing.append(_LAST)
            unsent.append(_LAST)
        keep = {f"{INCOMING}/{name}" for name in arrived}
        self._shell(_with(["rm", "-f"], [name for name in foreign if name not in keep]))
        self._check_room(unsent)
        self._send(unsent)
        self._install(missing)
        removed = sum(not name.startswith(f"{INCOMING}/") for name in foreign)
        return PushReport(len(unsent), self._bytes(unsent), len(self._files) - len(missing), removed)

    def _sums(self) -> dict[str, str]:
        """Return the checksum of every file below the folder, as the device computes it now."""
        timeout_s = _SHORT_S + 2 * self._bytes(self._files) / _SLOWEST
        command = f"cd {self._folder} 2>/dev/null && find . -type f -exec sha256sum {{}} +"
        answer = self._adb.shell(command, timeout_s=timeout_s, doing="checksums were computed")
        return {match[2]: match[1] for match in _SUM.finditer(answer.out.replace("\r\n", "\n"))}

    def _check_room(self, names: Iterable[str]) -> None:
        needed, free = self._bytes(names), free_bytes(self._adb, self._folder)
        if needed > free:
            raise DeviceFullError(
                f"device `{self._adb.serial}` has {free / 1e6:.1f} MB free below {self._folder}; "
                f"{needed / 1e6:.1f} MB are to be sent",
                hint="free some space on the phone and run the same command again: it goes on from there",
            )

    def _send(self, names: list[str]) -> None:
        by_folder: dict[PurePosixPath, list[str]] = defaultdict(list)
        for name in names:
            self._check_content(name)
            by_folder[PurePosixPath(INCOMING, name).parent].append(name)
        self._shell(_with(["mkdir", "-p"], map(str, by_folder)))
        for folder, group in by_folder.items():
            # adb puts files of several folders into one: a call per folder keeps them apart.
            for part in _parts(group):
                timeout_s = _SHORT_S + self._bytes(part) / _SLOWEST
                paths = [self._files[name].path for name in part]
                if any(path.name != PurePosixPath(name).name for path, name in zip(paths, part, strict=True)):
                    raise UsageError(f"files {part} would get other names", hint="a file keeps its name on the phone")
                self._adb.push(paths, f"{self._folder}/{folder}", timeout_s=timeout_s)
        there = self._sums()
        damaged = [name for name in names if there.get(f"{INCOMING}/{name}") != self._files[name].sha256]
        if damaged:
            raise DeviceError(
                f"`{damaged[0]}` did not arrive on device `{self._adb.serial}` as it was sent",
                hint="try another cable or port, and run the same command again: only what is missing is sent",
            )

    def _install(self, names: list[str]) -> None:
        by_folder: dict[PurePosixPath, list[str]] = defaultdict(list)
        for name in names:
            if name != _LAST:
                by_folder[PurePosixPath(name).parent].append(f"{INCOMING}/{name}")
        self._shell(_with(["mkdir", "-p"], map(str, by_folder)))
        for folder, sources in by_folder.items():
            self._shell(f"mv -f {quoted(*part)} {quoted(str(folder))}/" for part in _parts(sources))
        # The manifest vouches for the rest, so the rest has to be on the disk before it.
        self._shell(["sync", f"mv -f {INCOMING}/{_LAST} {_LAST}", f"rm -rf {INCOMING}"])

    def _shell(self, commands: Iterable[str]) -> None:
        prefix = f"mkdir -p {self._folder} && cd {self._folder}"
        for part in _parts(list(commands)):
            self._adb.shell_ok(" && ".join([prefix, *part]), timeout_s=120, doing="files were put in place")

    def _check_content(self, name: str) -> None:
        file = self._files[name]
        if not file.path.is_file() or sha256_file(file.path) != file.sha256:
            raise UsageError(f"`{file.path}` is not what the bundle's manifest says", hint="package the bundle again")

    def _bytes(self, names: Iterable[str]) -> int:
        return sum(self._files[name].nbytes for name in names)


def _check_names(names: Iterable[str], remote: str) -> None:
    if not re.fullmatch(_REMOTE, remote):
        raise UsageError(
            f"`{remote}` cannot be a folder for bundles on a phone",
            hint="write an absolute path of letters, digits and `_.+-`, such as /data/local/tmp/sdconvert",
        )
    unfit = [name for name in names if not re.fullmatch(BUNDLE_PATH, name)]
    if unfit:
        raise UsageError(f"file name {unfit[0]!r} could lead out of the bundle", hint="package the bundle again")


def _with(command: list[str], arguments: Iterable[str]) -> Iterator[str]:
    return (quoted(*command, *part) for part in _parts(list(arguments)))


def _parts(words: list[str]) -> Iterator[list[str]]:
    """Cut a list so that each part fits on a command line of any device."""
    part: list[str] = []
    for word in words:
        if part and sum(map(len, part)) + len(part) + len(word) > _ARGUMENT_BYTES:
            yield part
            part = []
        part.append(word)
    if part:
        yield part
