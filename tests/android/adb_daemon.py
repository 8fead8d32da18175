"""A device's adb daemon: the ADB wire protocol over TCP on loopback, as much of it as the real clients ask for.

A message is a header of six little-endian words (command, two arguments, length, checksum, inverted command) and a
payload. A stream is opened for a service (`shell,v2,raw:ls`, `sync:`), and every WRTE waits for its OKAY.
"""

import contextlib
import queue
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

_HEADER = struct.Struct("<6I")
_VERSION, MAX_PAYLOAD = 0x01000001, 1 << 20
_TOKEN, _TOKEN_BYTES = 1, 20


class Gone(ConnectionError):
    """The other side closed the stream, or the cable was pulled."""


class Stream:
    """One open service: bytes to and from the client."""

    def __init__(self, connection: "Connection", local: int, remote: int) -> None:
        self._connection, self._local, self._remote = connection, local, remote
        self._inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._acknowledged = threading.Semaphore(0)
        self._rest = b""
        self.closed = threading.Event()

    def read(self) -> bytes:
        """Return the next bytes of the client, as they came; none once the cable is pulled, not even those received."""
        if self._connection.lost.is_set():
            raise Gone
        if self._rest:
            data, self._rest = self._rest, b""
            return data
        data = self._inbox.get()
        if data is None:
            self._inbox.put(None)
            raise Gone
        self._connection.send(b"OKAY", self._local, self._remote)
        return data

    def read_exactly(self, count: int) -> bytes:
        """Return so many bytes of the client."""
        parts, missing = [], count
        while missing:
            data = self.read()
            parts.append(data[:missing])
            self._rest = data[missing:]
            missing -= len(parts[-1])
        return b"".join(parts)

    def write(self, data: bytes) -> None:
        """Send bytes, and wait until the client has them."""
        for begin in range(0, len(data), MAX_PAYLOAD):
            self._connection.send(b"WRTE", self._local, self._remote, data[begin : begin + MAX_PAYLOAD])
            self._acknowledged.acquire()
            if self.closed.is_set():
                raise Gone

    def received(self, data: bytes) -> None:
        self._inbox.put(data)

    def acknowledged(self) -> None:
        self._acknowledged.release()

    def close(self) -> None:
        self.closed.set()
        self._inbox.put(None)
        self._acknowledged.release()

    def finish(self) -> None:
        """Tell the client that the service has ended."""
        with contextlib.suppress(OSError):
            self._connection.send(b"CLSE", self._local, self._remote)


class Services(Protocol):
    """What the daemon asks of its device."""

    banner: bytes
    authorized: bool

    def serve(self, service: str, stream: Stream) -> None: ...


class Connection:
    """One adb server's connection: reads messages and hands them to their streams."""

    def __init__(self, channel: socket.socket, device: Services) -> None:
        self._channel, self._device = channel, device
        self.lost = threading.Event()
        self._sending = threading.Lock()
        self._streams: dict[int, Stream] = {}

    def send(self, command: bytes, first: int, second: int, data: bytes = b"") -> None:
        word = int.from_bytes(command, "little")
        # From this version on only the messages that come before it is agreed need a checksum.
        checksum = sum(data) if command in (b"CNXN", b"AUTH") else 0
        header = _HEADER.pack(word, first, second, len(data), checksum, ~word & 0xFFFFFFFF)
        with self._sending:
            self._channel.sendall(header + data)

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                word, first, second, length, _, _ = _HEADER.unpack(self._receive(_HEADER.size))
                self._handle(word.to_bytes(4, "little"), first, second, self._receive(length))
        for stream in self._streams.copy().values():
            stream.close()
        self.close()

    def close(self) -> None:
        """Pull the cable: the client learns nothing more."""
        self.lost.set()
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        self._channel.close()

    def _receive(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self._channel.recv(count - len(data))
            if not part:
                raise Gone
            data += part
        return bytes(data)

    def _handle(self, command: bytes, first: int, second: int, data: bytes) -> None:
        if command in (b"CNXN", b"AUTH"):
            # Whatever key is offered, a phone whose user has not answered the dialog asks again.
            if self._device.authorized:
                self.send(b"CNXN", _VERSION, MAX_PAYLOAD, self._device.banner)
            elif command == b"CNXN" or first != 3:
                self.send(b"AUTH", _TOKEN, 0, bytes(range(_TOKEN_BYTES)))
        elif command == b"OPEN":
            stream = self._streams[first] = Stream(self, local=first, remote=first)
            self.send(b"OKAY", first, first)
            threading.Thread(target=self._serve, args=(data.rstrip(b"\0").decode(), first, stream), daemon=True).start()
        elif stream := self._streams.get(second):
            if command == b"WRTE":
                stream.received(data)
            elif command == b"OKAY":
                stream.acknowledged()
            elif command == b"CLSE":
                stream.close()

    def _serve(self, service: str, number: int, stream: Stream) -> None:
        with contextlib.suppress(OSError):
            self._device.serve(service, stream)
        stream.finish()
        self._streams.pop(number, None)


@dataclass
class Trap:
    """A fault: `action` happens once, when `event` is about something that `pattern` matches, `after` so many bytes."""

    event: str
    pattern: str
    action: Callable[[], None]
    after: int = 0

    def springs(self, event: str, what: str, nbytes: int) -> bool:
        return event == self.event and nbytes >= self.after and re.search(self.pattern, what) is not None


class Daemon:
    """Listens on a port of its own; `unplug` closes everything at once, `plug` comes back under the same serial."""

    def __init__(self, device: Services) -> None:
        self._device = device
        self._connections: list[Connection] = []
        self._listener: socket.socket | None = None
        self.port = 0
        self.plug()

    @property
    def serial(self) -> str:
        return f"127.0.0.1:{self.port}"

    def plug(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def unplug(self) -> None:
        if self._listener:
            # A blocked accept() returns only when the socket is shut down, and keeps the port until it does.
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        connections, self._connections = self._connections, []
        for connection in connections:
            connection.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                channel, _ = listener.accept()
                channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = Connection(channel, self._device)
                self._connections.append(connection)
                threading.Thread(target=connection.run, daemon=True).start()
