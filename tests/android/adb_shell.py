"""The `shell` and `exec` services of an adb daemon: one command in the device's shell."""

import contextlib
import os
import signal
import struct
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from adb_daemon import Stream

_STDIN, _STDOUT, _STDERR, _EXIT, _CLOSE_STDIN = range(5)


def serve_shell(
    stream: Stream,
    command: str,
    *,
    shell: Path,
    root: Path,
    environment: Mapping[str, str],
    packets: bool,
    heard: Callable[[str], None],
    started: Callable[[int], None],
) -> None:
    """Run `command` and carry its input, output and exit code; with `packets` in the shell protocol (`shell,v2`)."""
    process = subprocess.Popen(
        [shell, "-c", command],
        cwd=root,
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if packets else subprocess.STDOUT,
        start_new_session=True,
    )
    started(process.pid)
    writing = threading.Lock()

    def send(kind: int, data: bytes) -> None:
        with writing:
            stream.write(struct.pack("<BI", kind, len(data)) + data if packets else data)

    def pump(kind: int, pipe: IO[bytes]) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(pipe.fileno(), 65536):
                heard(data.decode(errors="replace"))
                send(kind, data)
        pipe.close()

    pipes = [(_STDOUT, process.stdout), (_STDERR, process.stderr)]
    pumps = [threading.Thread(target=pump, args=(kind, pipe), daemon=True) for kind, pipe in pipes if pipe]
    feeder = threading.Thread(target=_feed, args=(stream, process, packets), daemon=True)
    for thread in [*pumps, feeder]:
        thread.start()
    code = process.wait()
    for thread in pumps:
        thread.join()
    if packets:
        # A shell reports a signal's death as 128 + its number.
        send(_EXIT, bytes([code if code >= 0 else 128 - code]))


def _feed(stream: Stream, process: subprocess.Popen[bytes], packets: bool) -> None:
    """Hand the client's input over; when the client goes, hang up as adbd does: the shell alone hears of it."""
    assert process.stdin
    try:
        while True:
            if packets:
                kind, length = struct.unpack("<BI", stream.read_exactly(5))
                data = stream.read_exactly(length)
            else:
                kind, data = _STDIN, stream.read()
            with contextlib.suppress(OSError, ValueError):
                if kind == _STDIN:
                    process.stdin.write(data)
                    process.stdin.flush()
                elif kind == _CLOSE_STDIN:
                    process.stdin.close()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            process.stdin.close()
        if process.poll() is None:
            process.send_signal(signal.SIGHUP)
