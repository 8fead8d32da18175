"""ONNX Runtime sessions on Qualcomm's HTP backend, the one place that touches `onnxruntime_qnn`.

On a host without an NPU the backend compiles for any SoC and executes in Qualcomm's HTP simulator.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from sdconvert.errors import CompileError, EnvironmentProblem
from sdconvert.qnn.phases import profile_path

_PROVIDER = "QNNExecutionProvider"
_FATAL_ONLY = 4


@cache
def _devices() -> list[Any]:
    # The library registers once per process; a second registration is an error.
    try:
        import onnxruntime
        import onnxruntime_qnn
    except ImportError as error:
        raise EnvironmentProblem(
            f"`{error.name}` is not installed", hint="onnxruntime-qnn has wheels for Linux x86_64; install it there"
        ) from error
    onnxruntime.register_execution_provider_library(_PROVIDER, onnxruntime_qnn.get_library_path())
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == _PROVIDER]


def has_npu() -> bool:
    """Tell whether ONNX Runtime finds an NPU on this computer; without one the backend is the simulator, or nothing."""
    return any(device.device.type.name == "NPU" for device in _devices())


def compiling_session(onnx: Path, ctx_onnx: Path, soc_model: int, finalization_mode: int, graphs: Path) -> Any:
    """Compile `onnx` for a SoC; its context is written as `ctx_onnx` and, beside it, `<stem>_qnn.bin`.

    The folder `graphs` gets a description of the graph that was compiled, as JSON, and the compiler's profile.
    """
    entries = {"ep.context_enable": "1", "ep.context_file_path": str(ctx_onnx), "ep.context_embed_mode": "0"}
    provider = {
        # Never `htp_arch`: alone it compiles for half of the VTCM, together with `soc_model` it is ignored.
        "soc_model": str(soc_model),
        "htp_graph_finalization_optimization_mode": str(finalization_mode),
        "offload_graph_io_quantization": "0",
        "dump_json_qnn_graph": "1",
        "json_qnn_graph_dir": str(graphs),
        "profiling_level": "detailed",
        "profiling_file_path": str(profile_path(graphs)),
    }
    return _session(onnx, entries, provider)


def dlc_session(onnx: Path, soc_model: int, folder: Path) -> Any:
    """Write the graph that would be compiled for a SoC as a DLC below a folder; such a session has no context."""
    _devices()
    import onnxruntime_qnn

    provider = {
        "soc_model": str(soc_model),
        "offload_graph_io_quantization": "0",
        "dump_qnn_ir_dlc": "1",
        "dump_qnn_ir_dlc_dir": str(folder),
        "qnn_ir_backend_path": str(Path(onnxruntime_qnn.get_library_path()).with_name("libQnnIr.so")),
    }
    return _session(onnx, {}, provider)


def context_session(ctx_onnx: Path, provider: Mapping[str, str] | None = None) -> Any:
    """Load a compiled context for execution; on a host without an NPU that is the simulator.

    Args:
        ctx_onnx: The EPContext model.
        provider: Further options of the backend, such as a profile to be written.

    Raises:
        CompileError: Its binary is missing or truncated.
    """
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidGraph

    try:
        with _native_stdout_nowhere():
            return _session(ctx_onnx, {}, dict(provider or {}), severity=_FATAL_ONLY)
    except InvalidGraph as error:
        message = f"the context of `{ctx_onnx}` cannot be loaded: {error}"
        raise CompileError(message, hint="its .bin is missing or truncated: compile it again") from error


def _session(model: Path, entries: dict[str, str], provider: dict[str, str], severity: int | None = None) -> Any:
    devices = _devices()
    import onnxruntime
    import onnxruntime_qnn

    options = onnxruntime.SessionOptions()
    if severity is not None:
        options.log_severity_level = severity
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    options.add_provider_for_devices(devices, {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), **provider})
    return onnxruntime.InferenceSession(str(model), options)


@contextmanager
def _native_stdout_nowhere() -> Iterator[None]:
    # QNN's libraries write to file descriptor 1 while they load, the same line in every process; errors come as
    # exceptions, and our stdout is data.
    sys.stdout.flush()
    saved = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
