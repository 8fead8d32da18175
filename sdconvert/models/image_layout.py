"""Tokens (b, T, C) and images (b, C, H, W) of the same values, by ops that the compiler can take out.

The HTP computes channels last. So each of these permutes channels to the end before it reshapes, and back after: the
permutations cancel against the compiler's own, and at most one reshape is left.
"""

from torch import Tensor


def tokens_to_image(tokens: Tensor) -> Tensor:
    """(b, T, C) -> (b, C, 1, T)."""
    return tokens.unsqueeze(1).permute(0, 3, 1, 2)


def image_to_tokens(image: Tensor) -> Tensor:
    """(b, C, H, W) -> (b, H*W, C)."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def in_one_row(image: Tensor) -> Tensor:
    """(b, C, H, W) -> (b, C, 1, H*W)."""
    if image.shape[2] == 1:
        return image
    batch, channels, height, width = image.shape
    return image.permute(0, 2, 3, 1).reshape(batch, 1, height * width, channels).permute(0, 3, 1, 2)


def in_rows(image: Tensor, height: int) -> Tensor:
    """(b, C, 1, H*W) -> (b, C, H, W), the reverse of `in_one_row`."""
    if height == 1:
        return image
    batch, channels, _, pixels = image.shape
    return image.permute(0, 2, 3, 1).reshape(batch, height, pixels // height, channels).permute(0, 3, 1, 2)


def in_one_row_by_columns(image: Tensor) -> Tensor:
    """(b, C, H, W) -> (b, C, 1, W*H), column after column: for keys and values, whose order has no effect.

    Of a graph input that several convolutions take, `in_one_row` would leave a Transpose before each: ONNX Runtime
    moves a permutation through a reshape that keeps the order of rows, and so past the point where they part.
    """
    batch, channels, height, width = image.shape
    return image.permute(0, 3, 2, 1).reshape(batch, 1, width * height, channels).permute(0, 3, 1, 2)
