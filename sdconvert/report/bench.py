"""What the report tells of a bench: every figure of its result, and of the simulator no time."""

from pathlib import Path
from typing import Any

from sdconvert.android.artifact import AndroidArtifact, read_bench
from sdconvert.errors import UsageError
from sdconvert.io.files import sha256_file

_OF_NO_INTEREST = {"schema_version", "session", "bundle", "test_inputs"}
_OF_A_DEVICE = {"latency", "invalid", "counters", "peak_kb", "climate", "cooled_s"}
_KINDS = ("vs_fp32", "vs_simulator")


def bench_figures(path: Path, android: AndroidArtifact) -> dict[str, Any]:
    """Return a bench's result as the report tells it; per graph also the worst output in dB.

    Args:
        path: A `bench.json`, or its folder.
        android: The bundle of the run that is told of.

    Raises:
        UsageError: It is no result, or that of another bundle.
    """
    result = read_bench(path)
    if result["bundle"] != sha256_file(android.bundle / "manifest.json"):
        raise UsageError(
            f"`{path}` is the result of another bundle than `{android.bundle}`", hint="run `sdconvert bench` with it"
        )
    told = {key: value for key, value in result.items() if key not in _OF_NO_INTEREST}
    if not result["is_device"]:
        told = _without_times(told)
    told["graphs"] = [graph | {"worst": _worst(graph["outputs"])} for graph in told["graphs"]]
    return told


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key for key in value if key not in _OF_A_DEVICE and not key.endswith("_ms")}
        return {key: _without_times(item) for key, item in value.items() if key in kept}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def _worst(outputs: dict[str, Any]) -> dict[str, float | None]:
    levels = {kind: [output[kind]["sqnr_db"] for output in outputs.values() if kind in output] for kind in _KINDS}
    return {kind: min(found, default=None) for kind, found in levels.items()}
