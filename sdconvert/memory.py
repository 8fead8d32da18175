"""How much memory a stretch of the program takes at its peak, and how what is freed gets back to the system."""

import ctypes
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_MMAP_THRESHOLD = -3  # mallopt(3): blocks of that size are no part of the heap
_BLOCK = 1 << 20
_LARGEST_THRESHOLD = 32 << 20  # where glibc's own one ends up in a program with large tensors
_UNIT = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes where Linux counts KiB


class PeakMemory:
    """The largest resident size since this object was made, of this process or of a child that has ended since.

    Linux lets a process reset its peak; elsewhere the peak is that of the whole process so far.
    """

    def __init__(self) -> None:
        if _RESET.exists():
            _RESET.write_text("5")  # resets VmHWM, see proc(5)
        self._children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss

    def peak_bytes(self) -> int:
        """Return the peak so far, in bytes."""
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if _RESET.exists():
            lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
            own = int(lines["VmHWM"].split()[0])
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        # The system keeps one maximum over all children: only a new record can be told from an old one.
        return max(own, children if children > self._children else 0) * _UNIT


def return_freed_memory() -> None:
    """Give back to the system what was freed: glibc keeps blocks below 32 MiB for itself, and they count as used."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Within, blocks of a MiB or more go back to the system as they are freed.

    glibc puts them on its heap as soon as one of up to 32 MiB was freed; tensors that come and go there leave holes
    between those that stay: AdaRound's samples went through a large UNet in 949 MiB that way, and in 501 without.
    """
    option = _of_glibc("mallopt")
    if option is None:
        yield
        return
    option(_MMAP_THRESHOLD, _BLOCK)
    holes = _take_holes()
    try:
        yield
    finally:
        free = ctypes.CDLL(None).free
        for hole in holes:
            free(ctypes.c_void_p(hole))
        option(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)


def _take_holes() -> list[int]:
    """Allocate what the heap has free in blocks, for glibc looks there first; untouched, it takes no memory."""
    return_freed_memory()
    library = ctypes.CDLL(None)
    malloc, sbrk = library.malloc, library.sbrk
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    sbrk.restype, sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    holes: list[int] = []
    while True:
        block = malloc(_BLOCK) or 0
        if block == 0 or block > (sbrk(0) or 0):  # beside the heap: it has no room for one any more
            library.free(ctypes.c_void_p(block))
            return holes
        holes.append(block)


def _of_glibc(name: str) -> Callable[..., Any] | None:
    """A function of the C library; None where it is another one, which gives back by itself."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
