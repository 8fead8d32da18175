"""What a runner's log says in numbers, and what helps; patterns as seen in public reports of such failures."""

import re

# A Skel that does not load ends with 14001 too, and may say the 1002 of missing memory: the first pattern counts.
_KNOWN = (
    (r"No space left on device", "the phone's storage is full: free some space"),
    (
        r"0x80000406|Unable to load Skel Library|Skel lib id mismatch|load skel, error: 1002\b|err(or)?:? 1008\b",
        "the Hexagon library was not found or is of another build: lib/ needs the Skel of this phone's architecture, "
        "from the same QAIRT SDK as all other libraries",
    ),
    (
        r"Transport layer setup failed: 14001|err(or)?:? 4000\b|No Snapdragon SOC detected",
        "this QAIRT build does not know the phone's SoC, or the vendor blocks the DSP: use a newer SDK",
    ),
    (r"0x80000416|err(or)?:? 1003\b", "this phone does not let programs of its users reach the DSP (no unsigned PD)"),
    (r"err(or)?:? 5005\b", "the DSP's memory is too small for this graph: split it, or lower the resolution"),
    (
        r"Could not create context from binary|Unsupported context binary version|err(or)?:? 5000\b",
        "the libraries are older than the compiler, or the context is for another SoC: use the bundle's SDK",
    ),
    (r"err(or)?:? 1002\b", "memory could not be allocated: split the graph, or lower the resolution"),
    (
        r"CANNOT LINK EXECUTABLE|not executable|library \S+ not found|No such file or directory|Permission denied",
        "a library is missing in lib/, or is no library of Android, or the folder may not hold programs",
    ),
)


def explain_log(log: str) -> str:
    """Return what helps against the failure that a log tells of, or the empty string if none is known."""
    return next((advice for pattern, advice in _KNOWN if re.search(pattern, log, re.IGNORECASE)), "")
