"""What layers return, kept for a comparison."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sdconvert.plugins.single import SinglePluginBlock


class CaptureBlock(SinglePluginBlock):
    """Keeps what a layer returned last; nothing is changed.

    Attributes:
        output: Of the latest call, the first entry if it was a tuple; None before the first.
    """

    def __init__(self, name: str, host: nn.Module) -> None:
        super().__init__(name, host)
        self.output: Tensor | None = None

    def forward(self, fea_in: tuple[Any, ...], fea_out: Any) -> None:
        """Keep the output."""
        self.output = (fea_out[0] if isinstance(fea_out, tuple) else fea_out).detach().as_subclass(Tensor)


@contextmanager
def capturing(layers: Mapping[str, nn.Module] | Iterable[tuple[str, nn.Module]]) -> Iterator[dict[str, Tensor]]:
    """Collect what layers return inside the block.

    Args:
        layers: By any key.

    Yields:
        Filled at the end of the block: the latest output of every layer that ran, by key.
    """
    outputs: dict[str, Tensor] = {}
    blocks = {key: CaptureBlock("capture", layer) for key, layer in dict(layers).items()}
    try:
        yield outputs
        outputs |= {key: block.output for key, block in blocks.items() if block.output is not None}
    finally:
        for block in blocks.values():
            block.remove()
