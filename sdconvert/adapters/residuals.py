"""Shapes of the residuals that a ControlNet hands to a UNet."""

from typing import Any


def residual_shapes(config: Any, size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Shapes of a UNet's skip connections, and of its middle.

    One of the stem, one per layer of a down block, one per downsampling (all blocks but the last halve the size,
    rounding up), and one of the mid block at the end.

    Args:
        config: Of a UNet2DConditionModel or ControlNetModel.
        size: Height and width of the sample.
    """
    widths = list(config.block_out_channels)
    layers = config.layers_per_block
    counts = [layers] * len(widths) if isinstance(layers, int) else list(layers)
    height, width = size
    shapes = [(1, widths[0], height, width)]
    for block, (channels, count) in enumerate(zip(widths, counts, strict=True)):
        shapes += [(1, channels, height, width)] * count
        if block < len(widths) - 1:
            height, width = -(-height // 2), -(-width // 2)
            shapes.append((1, channels, height, width))
    return [*shapes, (1, widths[-1], height, width)]
