"""What compiling a graph takes in memory, and at least simulating one."""

# A process that simulates the small model took 1.3 GiB; what a large one takes was not measured.
SIMULATING_BYTES = 3 << 29
# The compiler took 2.4 GiB for 347 MiB, a ControlNet of Stable Diffusion's size at 512 pixels, and 7.6 GiB for
# 1,065 MiB, the UNet (`benchmarks/compile_fullsize.py`).
_PROCESS_BYTES, _COPIES = 1 << 29, 7.5


def bytes_to_compile(graph: int) -> int:
    """Peak memory of the HTP compiler, from the bytes of a Q/DQ graph with its weights."""
    return _PROCESS_BYTES + int(_COPIES * graph)
