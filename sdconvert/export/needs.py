"""What exporting a graph takes in memory."""

# A process that exports a small graph took 1.5 GiB, with a ControlNet and a UNet of Stable Diffusion's size 4.0 and
# 9.7 GiB for 1.3 and 4.1 GiB of weights (`benchmarks/compile_fullsize.py`).
_PROCESS_BYTES, _COPIES = 7 << 28, 2


def bytes_to_export(weights: int) -> int:
    """Peak memory of a process that quantizes and exports a graph, from the bytes of its weights in fp32."""
    return _PROCESS_BYTES + _COPIES * weights
