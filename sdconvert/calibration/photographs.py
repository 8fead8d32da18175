"""Where a recipe's photographs lie."""

from pathlib import Path

from sdconvert.assets import photograph_path


def photograph_file(name: str) -> Path:
    """The file that a recipe means: a path, or the name of a photograph that ships with sdconvert.

    Raises:
        UsageError: It is neither.
    """
    return Path(name) if Path(name).is_file() else photograph_path(name)
