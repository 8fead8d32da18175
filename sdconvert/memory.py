"""How much memory a stretch of the program takes at its peak, and how what is freed gets back to the system."""

import ctypes
import resource
import sys
from pathlib import Path

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
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
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none, and gives back by itself
        if trim is not None:
            trim(0)
