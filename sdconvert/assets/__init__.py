"""Files that travel with the package: the trained `pasd_tiny` and the photographs that it is measured on."""

import difflib
from collections.abc import Mapping
from pathlib import Path

from sdconvert.errors import UsageError

_FOLDER = Path(__file__).parent
HELD_OUT = ("chelsea", "china")
"""Photographs that no training and no calibration may see."""


def assets() -> dict[str, Path]:
    """All assets by name: models and other folders."""
    return {path.name: path for path in sorted(_FOLDER.iterdir()) if path.is_dir() and not path.name.startswith("_")}


def photographs() -> dict[str, Path]:
    """All photographs by name, without their suffix; `HELD_OUT` names those that no calibration may see."""
    return {path.stem: path for path in sorted((_FOLDER / "photos").glob("*.*")) if path.suffix in {".png", ".jpg"}}


def asset_path(name: str) -> Path:
    """Where an asset lies, for instance `pasd_tiny`.

    Raises:
        UsageError: There is no such asset.
    """
    return _find("asset", name, assets())


def photograph_path(name: str) -> Path:
    """Where a photograph lies, for instance `chelsea`.

    Raises:
        UsageError: There is no such photograph.
    """
    return _find("photograph", name, photographs())


def _find(kind: str, name: str, known: Mapping[str, Path]) -> Path:
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known)
        raise UsageError(
            f"There is no {kind} named {name!r}.",
            hint=f"Did you mean {', '.join(nearest)}?",
        )
    return known[name]
