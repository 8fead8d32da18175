"""How a recipe or a file names several layers at once; without torch, for commands that move weights alone."""

from fnmatch import fnmatchcase

_GLOB = frozenset("*?[")


def matches_pattern(pattern: str, path: str) -> bool:
    """Whether a path is the one that a pattern says, or fits it as in a shell: `*` also stands for dots."""
    return pattern == path or (not _GLOB.isdisjoint(pattern) and fnmatchcase(path, pattern))
