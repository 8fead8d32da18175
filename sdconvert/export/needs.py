"""What exporting a graph takes in memory."""

# A process that exports a small graph took 1.5 GiB; with a ControlNet of Stable Diffusion's size, 1.3 GiB of weights,
# 4.0 GiB at 512 pixels; with a UNet, 4.1 GiB of weights, 9.7 GiB, and at 768 pixels 10.2 GiB
# (`benchmarks/compile_fullsize.py`). Attention's scores grow with the latent's side to the fourth.
_PROCESS_BYTES, _COPIES = 7 << 28, 2
_SCORES_BYTES, _SIDE = 128 << 20, 64


def bytes_to_export(weights: int, latent: int) -> int:
    """Peak memory of a process that quantizes and exports a graph.

    Args:
        weights: Bytes of its weights in fp32.
        latent: Side of the latent.
    """
    return _PROCESS_BYTES + _COPIES * weights + int(_SCORES_BYTES * (latent / _SIDE) ** 4)
