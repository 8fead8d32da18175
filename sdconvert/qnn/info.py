"""What a context binary says about itself, read from its plain text and compared with the table.

The loader takes a context for another SoC, or one with damaged bytes, without a word; and a wrong provider option
changes SoC and VTCM silently. So nothing is believed but the file.
"""

import mmap
import re
from dataclasses import dataclass
from pathlib import Path

from sdconvert.errors import CompileError
from sdconvert.soc import Soc

_FIELDS = {
    "soc_type": rb";soc_type=([^;]+);",
    "arch": rb";arch=(\d+);",
    "min_arch": rb";min_arch=(\d+);",
    "vtcm_size": rb";vtcm_size=(\d+);",
    "hvx_threads": rb";hvx_threads=(\d+);",
    "qairt": rb"v(\d+\.\d+\.\d+\.\d{12})",
}


@dataclass(frozen=True)
class ContextInfo:
    """What a context binary says about itself; `vtcm_mb` in MiB, `qairt` the build as `2.51.0.260929181845`."""

    soc_type: str
    arch: int
    min_arch: int
    vtcm_mb: int
    hvx_threads: int
    qairt: str


def parse_context_info(data: mmap.mmap | memoryview | bytes, name: str) -> ContextInfo:
    """Read what a context binary says about itself; `name` is for the messages.

    Raises:
        CompileError: A field is missing (not an HTP context), or two graphs in it disagree.
    """
    found: dict[str, str] = {}
    for field, pattern in _FIELDS.items():
        values = {match[1].decode() for match in re.finditer(pattern, data)}
        if len(values) != 1:
            what = f"says {field} = {' and '.join(sorted(values))}" if values else f"carries no {field}"
            raise CompileError(
                f"`{name}` {what}", hint="it is not a context for one SoC, or it is damaged: compile it again"
            )
        found[field] = values.pop()
    return ContextInfo(
        soc_type=found["soc_type"],
        arch=int(found["arch"]),
        min_arch=int(found["min_arch"]),
        vtcm_mb=int(found["vtcm_size"]) >> 20,
        hvx_threads=int(found["hvx_threads"]),
        qairt=found["qairt"],
    )


def read_context_info(path: Path) -> ContextInfo:
    """Read what the context binary `path` says about itself, without loading it.

    Raises:
        CompileError: It is not the context of one SoC.
    """
    if path.stat().st_size == 0:
        return parse_context_info(b"", path.name)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return parse_context_info(data, path.name)


def check_context_info(info: ContextInfo, soc: Soc, name: str) -> None:
    """Compare what the context binary `name` says with the table's row.

    Raises:
        CompileError: It was compiled for something else.
    """
    wanted = {
        "soc_type": soc.soc_type,
        "arch": soc.compiled_arch,
        "min_arch": soc.arch,
        "vtcm_mb": soc.vtcm_mb,
        "hvx_threads": soc.hvx_threads,
    }
    wrong = [f"{k} = {getattr(info, k)}, expected {v}" for k, v in wanted.items() if getattr(info, k) != v]
    if wrong:
        raise CompileError(
            f"`{name}` is not a context for {soc.name}: {'; '.join(wrong)}",
            hint=f"compile it with soc_model {soc.soc_model} and no other architecture option",
        )
