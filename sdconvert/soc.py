"""The Snapdragon table: what Qualcomm's compiler itself answered for every SoC id that it knows.

`soc.csv` holds one row per name a user may write. `soc_type`, `compiled_arch`, `vtcm_mb` and `hvx_threads` were read
from a context compiled for that `soc_model` (QAIRT 2.51), `arch` is the Hexagon generation the compiler requires there.
A name that differs from its `soc_type` is compiled as that other SoC.
"""

import csv
import difflib
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from sdconvert.errors import UsageError

_FIRST_HTP_ARCH = 68
_LAST_ARCH_WITH_RUNTIME = 81
_UNKNOWN_VTCM_MB = 16
_VARIANT = re.compile(r"(-A[A-Z]|P)$")


@dataclass(frozen=True)
class Soc:
    """One Snapdragon: the name asked for, and what a context compiled for it says about itself."""

    soc_model: int
    """QNN's id, which is another numbering than the kernel's `soc_id`."""
    name: str
    soc_type: str
    """The name that the compiler writes into the context."""
    arch: int
    """Hexagon generation, 75 for V75."""
    compiled_arch: int
    """The generation whose tuning the compiler used; below `arch` it had none for this SoC."""
    vtcm_mb: int
    hvx_threads: int
    marketing: str

    @property
    def note(self) -> str:
        """What a user should know before relying on this SoC, or the empty string."""
        notes = []
        if self.name != self.soc_type.upper():
            notes.append(f"compiled as {self.soc_type} (soc_model {self.soc_model}), whose contexts it runs")
        if self.compiled_arch != self.arch:
            notes.append(f"the compiler has no tuning of its own for it and uses V{self.compiled_arch}'s")
        elif self.vtcm_mb == _UNKNOWN_VTCM_MB and self.arch == _FIRST_HTP_ARCH:
            notes.append("the compiler does not know it and assumes a default V68")
        if self.arch > _LAST_ARCH_WITH_RUNTIME:
            notes.append(f"no published Linux runtime has V{self.arch} libraries yet; the QAIRT SDK has them")
        return "; ".join(notes)


@cache
def soc_table() -> dict[str, Soc]:
    """Return every SoC of the table by name, in alphabetical order."""
    with (files("sdconvert") / "soc.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        row["name"]: Soc(
            soc_model=int(row["soc_model"]),
            name=row["name"],
            soc_type=row["soc_type"],
            arch=int(row["arch"]),
            compiled_arch=int(row["compiled_arch"]),
            vtcm_mb=int(row["vtcm_mb"]),
            hvx_threads=int(row["hvx_threads"]),
            marketing=row["marketing"],
        )
        for row in rows
    }


def find_soc(name: str) -> Soc:
    """Return the SoC called `name`; case and the variant suffixes that phones report (`-AB`, `P`) do not matter.

    Raises:
        UsageError: No such SoC, with the nearest names; or its Hexagon is older than the HTP.
    """
    table = soc_table()
    wanted = name.strip().upper()
    soc = table.get(wanted) or table.get(_VARIANT.sub("", wanted))
    if soc is None:
        raise UsageError(f"unknown SoC `{name}`", hint=_nearest(wanted, table))
    if soc.arch < _FIRST_HTP_ARCH:
        raise UsageError(
            f"SoC `{soc.name}` has Hexagon V{soc.arch}; the HTP begins with V{_FIRST_HTP_ARCH}",
            hint="choose a SoC of 2021 or later, such as SM8350 (Snapdragon 888)",
        )
    return soc


def _nearest(wanted: str, table: dict[str, Soc]) -> str:
    labels = {soc.name: soc.name for soc in table.values()}
    for soc in table.values():
        if soc.marketing:
            # People say "8 Gen 3", not "Snapdragon 8 Gen 3": both lead to the name.
            labels[soc.marketing.upper()] = labels[soc.marketing.upper().removeprefix("SNAPDRAGON ")] = soc.name
    close = dict.fromkeys(labels[match] for match in difflib.get_close_matches(wanted, labels, n=5, cutoff=0.5))
    if not close:
        return "names look like SM8650 (Snapdragon 8 Gen 3); the table is sdconvert/soc.csv"
    return "did you mean " + ", ".join(f"{n} ({m})" if (m := table[n].marketing) else n for n in close) + "?"
