"""Patches that put another module in a layer's place: both stand side by side until the patch is fused."""

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn

from sdconvert.errors import PluginError
from sdconvert.plugins.base import unwrap
from sdconvert.plugins.container import PatchPluginContainer
from sdconvert.plugins.patch import PatchPluginBlock
from sdconvert.plugins.selectors import LayerMatch, iter_layers
from sdconvert.registry import Offender, refuse_together


class ReplacementContainer(PatchPluginContainer):
    """Runs a layer's hooks and its inner patches around the layer or around what replaces it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the replacement, or the layer while the patch is disabled."""
        enabled = [plugin for plugin in self.plugins if plugin.enabled]
        if not enabled:
            return self._host(*args, **kwargs)
        # Shadowing only the layer's forward leaves its call, and so the hooks on it, in place.
        layer = unwrap(self._host)
        layer.__dict__["forward"] = enabled[0].replacement
        try:
            return self._host(*args, **kwargs)
        finally:
            del layer.__dict__["forward"]


class ReplacementPatch(PatchPluginBlock):
    """Another form of a layer, in place, next to the original until it is fused.

    The model computes the new form while the patch is attached, the original inside `with patch.disabled():`, and the
    new form without the original after `fuse()`.

    Attributes:
        what: What the patch makes of a layer, for messages: `a 1x1 convolution`.
        way_out: What to do about layers that are refused.
    """

    container_cls = ReplacementContainer
    what: ClassVar[str]
    way_out: ClassVar[str] = "leave it out with exclude_key="

    def __init__(self, name: str, host: nn.Module, **kwargs: Any) -> None:
        super().__init__(name, host, **kwargs)
        layer = unwrap(host)
        _refuse_if(type(self), [("", layer, self.reason_against(layer))], f"a {type(layer).__name__}")
        self.replacement = self.replace(layer)

    @classmethod
    def replace(cls, layer: Any) -> nn.Module:
        """The other form of a layer; its parameters are views of the layer's."""
        raise TypeError(f"{cls.__name__} replaces nothing")

    @classmethod
    def reason_against(cls, layer: Any) -> str | None:
        """Why a layer cannot be replaced, or None if it can."""
        return None

    @classmethod
    def selects(cls, path: str, model: nn.Module) -> bool:
        """Whether a layer of `wrapable_classes` at a path is meant."""
        return True

    @classmethod
    def concerns(cls, model: nn.Module) -> bool:
        """Whether there is a layer that `wrap_model` would replace or refuse."""
        classes = tuple(cls.wrapable_classes)
        return any(
            isinstance(unwrap(layer), classes) and cls.selects(path, model) for path, layer in iter_layers(model)
        )

    def patched_module(self) -> nn.Module:
        """The other form."""
        return self.replacement

    @classmethod
    def find_layers(
        cls, model: nn.Module, exclude_key: str | None = None, exclude_classes: Iterable[type[nn.Module]] = ()
    ) -> list[LayerMatch]:
        """The layers that `wrap_model` replaces.

        Raises:
            PluginError: There are none.
            UnsupportedModelError: Some of them cannot be replaced; the message lists them all.
        """
        matches = super().find_layers(model, exclude_key, exclude_classes)
        chosen = [match for match in matches if cls.selects(match.path, model)]
        if not chosen:
            raise PluginError(
                f"{cls.__name__} finds no layer in {type(model).__name__} that can become {cls.what}",
                hint="check the model and exclude_key",
            )
        layers = [(match.path, unwrap(match.module)) for match in chosen]
        judged = [(path, layer, cls.reason_against(layer)) for path, layer in layers]
        _refuse_if(cls, judged, f"{len(judged)} layers of {type(model).__name__}")
        return chosen


def _refuse_if(cls: type[ReplacementPatch], judged: list[tuple[str, nn.Module, str | None]], of: str) -> None:
    offenders = [Offender(path, type(layer), reason) for path, layer, reason in judged if reason]
    refuse_together(f"{len(offenders)} of {of} cannot become {cls.what}", offenders, hint=cls.way_out)
