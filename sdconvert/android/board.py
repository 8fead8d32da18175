"""A board with Linux and a Hexagon, on which sdconvert itself runs: ONNX Runtime instead of qnn-net-run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdconvert.android.climate import Climate
from sdconvert.android.manifest import GraphRecord, Manifest
from sdconvert.android.runners import SimulatorRunner
from sdconvert.android.timing import Timing
from sdconvert.errors import DeviceError, UsageError
from sdconvert.soc import find_soc

_SENSORS = ("nsp", "cdsp", "skin")


@dataclass
class BoardRunner(SimulatorRunner):
    """The simulator's session on the board's own NPU; times hold what ONNX Runtime adds.

    Args:
        soc: The SoC of the bundle whose contexts are run.
        load: Opens an EPContext model on the NPU.
        warm_up: Inferences before those that count.
        system: Where the kernel tells of itself.
    """

    name: str = "ort"
    clock: str = "ONNX Runtime run"
    is_device: bool = True
    warm_up: int = 10
    system: Path = Path("/sys")

    def timing(self, bundle: Path, manifest: Manifest, graph: GraphRecord, inferences: int) -> Timing:
        """See `Runner`."""
        before = self.climate()
        found = super().timing(bundle, manifest, graph, inferences + self.warm_up)
        return replace(found, times_ms=found.times_ms[self.warm_up :], climates=((before, self.climate()),))

    def climate(self) -> Climate:
        """See `Runner`; the kernel has no thermal status, and thousandths of a degree."""
        celsius = {}
        for zone in sorted((self.system / "class/thermal").glob("thermal_zone*")):
            name = (zone / "type").read_text().strip()
            if any(part in name for part in _SENSORS):
                celsius[name] = int((zone / "temp").read_text()) / 1000
        return Climate(None, celsius)

    def about(self) -> tuple[dict[str, Any] | None, list[str]]:
        """See `Runner`."""
        return {"model": _read(self.system / "firmware/devicetree/base/model"), "soc": board_soc(self.system)}, []


def board_soc(system: Path = Path("/sys")) -> str:
    """Return the SoC that this board has.

    Raises:
        DeviceError: The kernel does not say, or names one without an NPU that sdconvert knows.
    """
    machine = _read(system / "devices/soc0/machine")
    try:
        return find_soc(machine).name
    except UsageError as error:
        raise DeviceError(
            f"this board does not say that it has an NPU that sdconvert knows (`{machine}`)", hint=error.hint
        ) from error


def choose_board_soc(manifest: Manifest, system: Path = Path("/sys")) -> str:
    """Return the SoC of the bundle whose contexts this board runs.

    Raises:
        UsageError: There is none.
        DeviceError: As `board_soc`.
    """
    board = find_soc(board_soc(system))
    for soc in manifest.socs:
        if soc.soc_model == board.soc_model:
            return soc.name
    there = ", ".join(soc.name for soc in manifest.socs)
    raise UsageError(
        f"the bundle is for {there}; this board has {board.name}",
        hint=f"compile for it too: `sdconvert package --soc {board.name}`",
    )


def _read(file: Path) -> str:
    return file.read_text(errors="replace").strip("\0\n ") if file.is_file() else ""
