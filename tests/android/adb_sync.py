"""The `sync:` service of an adb daemon: stat, list, push and pull, in the protocol's first and second version."""

import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

from adb_daemon import Stream

_CHUNK = 64 * 1024
_STAT = struct.Struct("<IQQIIIIQqqq")


class SyncService:
    """Serves one stream.

    Args:
        stream: To the client.
        host_path: Where a device path lies on the host.
        told: Hears of event, path and bytes so far before anything is written or read, and may raise OSError.
        count: Hears how many bytes of files the client has sent.
    """

    def __init__(
        self,
        stream: Stream,
        host_path: Callable[[str], Path],
        told: Callable[[str, str, int], None],
        count: Callable[[int], None],
    ) -> None:
        self._stream, self._host_path, self._told, self._count = stream, host_path, told, count

    def serve(self) -> None:
        while True:
            kind, length = self._read("<4sI")
            path = self._stream.read_exactly(length).decode()
            if kind == b"QUIT":
                return
            answer = {
                b"STAT": self._stat_v1,
                b"STA2": self._stat_v2,
                b"LST2": self._lstat_v2,
                b"LIST": self._list_v1,
                b"LIS2": self._list_v2,
                b"SEND": self._send_v1,
                b"SND2": self._send_v2,
                b"RECV": self._receive,
                b"RCV2": self._receive_v2,
            }.get(kind)
            if answer is None:
                self._fail(f"unknown command {kind!r}")
                return
            answer(path)

    def _read(self, form: str) -> tuple[bytes, int]:
        kind, number = struct.unpack(form, self._stream.read_exactly(struct.calcsize(form)))
        return kind, number

    def _fail(self, message: str) -> None:
        text = message.encode()
        self._stream.write(struct.pack("<4sI", b"FAIL", len(text)) + text)

    def _stat_v1(self, path: str) -> None:
        found = self._try_stat(path, follow=False)
        numbers = (
            (found.st_mode, found.st_size, int(found.st_mtime)) if isinstance(found, os.stat_result) else (0, 0, 0)
        )
        self._stream.write(struct.pack("<4s3I", b"STAT", *numbers))

    def _stat_v2(self, path: str) -> None:
        self._stream.write(b"STA2" + _pack_stat(self._try_stat(path, follow=True)))

    def _lstat_v2(self, path: str) -> None:
        self._stream.write(b"LST2" + _pack_stat(self._try_stat(path, follow=False)))

    def _try_stat(self, path: str, *, follow: bool) -> os.stat_result | int:
        try:
            return self._host_path(path).stat(follow_symlinks=follow)
        except OSError as error:
            return error.errno or 5

    def _entries(self, path: str) -> list[Path]:
        folder = self._host_path(path)
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def _list_v1(self, path: str) -> None:
        for entry in self._entries(path):
            found, name = entry.lstat(), entry.name.encode()
            numbers = (found.st_mode, found.st_size, int(found.st_mtime), len(name))
            self._stream.write(struct.pack("<4s4I", b"DENT", *numbers) + name)
        self._stream.write(struct.pack("<4s4I", b"DONE", 0, 0, 0, 0))

    def _list_v2(self, path: str) -> None:
        for entry in self._entries(path):
            name = entry.name.encode()
            self._stream.write(b"DNT2" + _pack_stat(entry.lstat()) + struct.pack("<I", len(name)) + name)
        self._stream.write(b"DONE" + _pack_stat(0) + struct.pack("<I", 0))

    def _send_v1(self, path_and_mode: str) -> None:
        path, _, mode = path_and_mode.rpartition(",")
        self._receive_file(path, int(mode))

    def _send_v2(self, path: str) -> None:
        _, mode, flags = struct.unpack("<4sII", self._stream.read_exactly(12))
        assert not flags, "no compression was offered"
        self._receive_file(path, mode)

    def _receive_file(self, path: str, mode: int) -> None:
        """Write what the client pushes; after an error the rest is read and dropped, as adbd does.

        When the connection ends in the middle, half a file stays, as when adbd itself is killed.
        """
        target, problem, written = self._host_path(path), "", 0
        self._told("send", path, 0)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            file = target.open("wb", buffering=0)
        except OSError as error:
            file, problem = None, f"couldn't create file: {error.strerror}"
        while True:
            kind, number = self._read("<4sI")
            if kind == b"DONE":
                break
            data = self._stream.read_exactly(number)
            self._count(number)
            if file and not problem:
                try:
                    self._told("data", path, written)
                    while data:
                        count = file.write(data)
                        data, written = data[count:], written + count
                except OSError as error:
                    problem = f"write failed: {error.strerror}"
        if file:
            file.close()
        if problem:
            target.unlink(missing_ok=True)
            self._fail(problem)
            return
        target.chmod(mode & 0o777)
        os.utime(target, (number, number))
        self._stream.write(struct.pack("<4sI", b"OKAY", 0))

    def _receive_v2(self, path: str) -> None:
        self._read("<4sI")  # flags: none were offered
        self._receive(path)

    def _receive(self, path: str) -> None:
        try:
            file = self._host_path(path).open("rb")
        except OSError as error:
            self._fail(f"open failed: {error.strerror}")
            return
        with file:
            sent = 0
            while data := file.read(_CHUNK):
                self._told("recv", path, sent)
                self._stream.write(struct.pack("<4sI", b"DATA", len(data)) + data)
                sent += len(data)
        self._stream.write(struct.pack("<4sI", b"DONE", 0))


def _pack_stat(found: os.stat_result | int) -> bytes:
    if isinstance(found, int):
        return _STAT.pack(found, *[0] * 10)
    kept = stat.S_IFMT(found.st_mode) | stat.S_IMODE(found.st_mode)
    times = (int(found.st_atime), int(found.st_mtime), int(found.st_ctime))
    return _STAT.pack(
        0, found.st_dev, found.st_ino, kept, found.st_nlink, found.st_uid, found.st_gid, found.st_size, *times
    )
