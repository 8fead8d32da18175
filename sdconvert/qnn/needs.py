"""What compiling a graph takes in memory, and what running contexts in the simulator does."""

# The compiler took 2.4 GiB for 347 MiB, a ControlNet of Stable Diffusion's size at 512 pixels; 7.7 GiB for 1,065 MiB,
# the UNet; and 16.7 GiB for the same UNet at 768 pixels (`benchmarks/compile_fullsize.py`). What grows is the schedule
# of attention, with the latent's side to the fourth.
_PROCESS_BYTES = 1 << 29
_COPIES, _SCHEDULE, _SIDE = 5.2, 2.2, 64
# A process that simulates the small model took 1.3 GiB; a picture has every context beside the model in fp32. What
# large ones take was not measured.
_SIMULATOR_BYTES, _CONTEXT_COPIES = 2 << 30, 6


def bytes_to_compile(graph: int, latent: int) -> int:
    """Peak memory of the HTP compiler.

    Args:
        graph: Bytes of the Q/DQ graph with its weights.
        latent: Side of the latent.
    """
    return _PROCESS_BYTES + int(graph * (_COPIES + _SCHEDULE * (latent / _SIDE) ** 4))


def bytes_to_simulate(contexts: int) -> int:
    """Peak memory of a process that runs contexts in the simulator, from their bytes together."""
    return _SIMULATOR_BYTES + _CONTEXT_COPIES * contexts
