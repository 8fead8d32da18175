"""Contexts on the NPU of the computer that this runs on: a board with Linux and a Hexagon.

The session is the simulator's; only the backend under it finds a device. No board was at hand: what runs here for real
are the refusals.
"""

import platform
from ctypes.util import find_library
from pathlib import Path

from sdconvert.errors import EnvironmentProblem
from sdconvert.qnn.session import has_npu
from sdconvert.qnn.simulator import Simulator


def require_npu(devices: Path = Path("/dev")) -> None:
    """Refuse to go on without an NPU, and say what is missing.

    Raises:
        EnvironmentProblem: There is none.
    """
    machine = platform.machine()
    if machine != "aarch64":
        raise EnvironmentProblem(
            f"this computer is {machine} and has no Hexagon NPU; --runner ort runs on the board itself",
            hint="copy the bundle and sdconvert to the board and run the command there, or use --runner sim",
        )
    if has_npu():
        return
    missing = [] if list(devices.glob("fastrpc-cdsp*")) else [f"a device {devices}/fastrpc-cdsp"]
    missing += [] if find_library("cdsprpc") else ["the library libcdsprpc.so"]
    told = " and ".join(missing) or "nothing that is known to be needed: see the log with -vv"
    raise EnvironmentProblem(
        f"ONNX Runtime finds no Hexagon NPU on this board; missing: {told}",
        hint="install the vendor's packages for the DSP (fastrpc, qairt-dsp-binaries); join the device's group",
    )


def load_on_npu(ctx_onnx: Path) -> Simulator:
    """Open an EPContext model on the NPU, at its highest clock.

    Raises:
        UsageError: The EPContext model is missing.
        CompileError: Its binary is missing or truncated.
    """
    return Simulator(ctx_onnx, {"htp_performance_mode": "burst"})
