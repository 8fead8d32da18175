"""A diffusers checkpoint goes in; a measured, ready-to-push Qualcomm Hexagon NPU bundle comes out."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdconvert.models.pasd import load_pasd

__version__ = "0.1.0"

__all__ = ["__version__", "load_pasd"]


def __getattr__(name: str) -> Any:
    """Import the models on first use: `import sdconvert` alone costs no torch."""
    if name == "load_pasd":
        from sdconvert.models.pasd import load_pasd

        return load_pasd
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
