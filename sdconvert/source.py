"""A checksum of the code that a stage runs: its own package and all of sdconvert that it imports, however indirectly.

A manifest that did not know the code would let an old result pass for that of a corrected program.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent
# They carry values and files to a stage but compute nothing in it: their effect is in the settings and hashes already.
_CARRIERS = frozenset({"artifacts.py", "config.py", "errors.py", "source.py", "stages.py", "__init__.py"})


def source_hash(path: Path) -> str:
    """Return the SHA-256 of the package that a file belongs to and of every file of sdconvert that it can import.

    Args:
        path: A file inside sdconvert, whose whole folder counts; or one outside, which counts alone.
    """
    inside = path.is_relative_to(PACKAGE)
    files = {path} if not inside else {file for file in path.parent.rglob("*") if _is_source(file)}
    waiting = [file for file in files if file.suffix == ".py"]
    while waiting:
        for name in imported_modules(waiting.pop()):
            file = _file(name)
            if file not in files and file.is_file():
                files.add(file)
                waiting.append(file)
    digest = hashlib.sha256()
    for name, file in sorted((_name(file), file) for file in files):
        if name not in _CARRIERS:
            digest.update(f"{name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def imported_modules(path: Path) -> tuple[str, ...]:
    """Name every module that a Python file imports, inside functions too; `from a import b` names `a` and `a.b`."""
    return _imports(path.read_text(encoding="utf-8"))


@cache  # stages share most of their files, and parsing all of them takes most of a second
def _imports(source: str) -> tuple[str, ...]:
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    return tuple(found)


def _file(module: str) -> Path:
    """Return the file of a module; for a foreign or unknown one, a file that does not exist."""
    top, *parts = module.split(".")
    if top != PACKAGE.name:
        return PACKAGE / "no such module"
    path = PACKAGE.joinpath(*parts)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _name(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix() if file.is_relative_to(PACKAGE) else file.name


def _is_source(file: Path) -> bool:
    return file.is_file() and "__pycache__" not in file.parts
