"""Per-layer figures: a probe from each layer of a model to the same layer of its quantized form."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from sdconvert.metrics import sqnr_db
from sdconvert.plugins import PluginBlock


class SQNRProbe(PluginBlock):
    """Measures in passing how far one layer's output is from another's; nothing is changed.

    The reference is held from the moment the from-layer makes it until the to-layer has been compared with it. Of a
    `pre_hook:` layer the first input counts, of a tuple the first entry.

    Attributes:
        sqnr_db: Of the to-layer's output against the from-layer's in the latest call; NaN before the first.
    """

    sqnr_db = math.nan

    def from_layer_hook(self, host: nn.Module, fea_in: tuple[Any, ...], fea_out: Any) -> None:
        """Keep the reference."""
        self.feat_from = _tensor(fea_in, fea_out)

    def forward(self, fea_from: Tensor, fea_in: tuple[Any, ...], fea_out: Any) -> None:
        """Compare, and let go of the reference; the to-layer's output stays."""
        self.feat_from = None
        self.sqnr_db = sqnr_db(fea_from, _tensor(fea_in, fea_out))


class Comparison(nn.Module):
    """Two forms of one model that run on the same inputs, one after the other.

    Its children are only the layers to be compared, as `fp.<name>` and `quant.<name>`: a model's other modules are
    many, and selectors walk all children.

    Args:
        fp: The reference.
        quant: Has children of the same names.
        names: Of the children to compare.
    """

    def __init__(self, fp: nn.Module, quant: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self._forms = (fp, quant)  # in a tuple, and so no children
        children = [(name, fp.get_submodule(name), quant.get_submodule(name)) for name in names]
        self.fp = nn.ModuleDict({name: child for name, child, _ in children})
        self.quant = nn.ModuleDict({name: child for name, _, child in children})

    def forward(self, *inputs: Tensor) -> None:
        """Run both."""
        for form in self._forms:
            form(*inputs)


@torch.no_grad()
def layer_sqnr_db(
    fp: nn.Module, quant: nn.Module, names: Mapping[str, str], inputs: Iterable[Tensor]
) -> dict[str, float]:
    """SQNR in dB between the children of two forms of a model, with one of the two runs' tensors in memory.

    Args:
        fp: The reference.
        quant: The form that is judged.
        names: Key in the result → name of the child in both.
        inputs: Of both, by position.

    Returns:
        Figures in the order of `names`; infinite where both are equal.
    """
    both = Comparison(fp, quant, names.values())
    sources, targets = ([f"{form}.{name}" for name in names.values()] for form in ("fp", "quant"))
    probes = SQNRProbe.wrap_model("sqnr", both, sources, targets)
    try:
        both(*inputs)
    finally:
        probes.remove()
    return {key: cast(SQNRProbe, probes[f"fp.{name}"]).sqnr_db for key, name in names.items()}


def _tensor(fea_in: tuple[Any, ...], fea_out: Any) -> Tensor:
    value = fea_in if fea_out is None else fea_out
    # AIMET's quantizers return a tensor class of their own.
    tensor: Tensor = (value[0] if isinstance(value, tuple) else value).as_subclass(Tensor)
    return tensor
