"""Files that happen whole or not at all, their checksums, and JSON with infinities.

Every file and folder is made under a temporary sibling name and renamed into place, so whoever finds a name finds it
complete.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdconvert.errors import EnvironmentProblem, PreconditionError

TEMPORARY = ".partial-"
"""How temporary names begin."""
_NUMBERS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(folder: Path) -> str:
    """Return one SHA-256 over the paths and contents of all files below a folder."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error, or one that it came from, says that the disk or the quota is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors and torch report the system's error as text only.
    if "No space left on device" in str(error) or "os error 28" in str(error):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and is_disk_full(cause)


@contextmanager
def explain_disk_full(folder: Path) -> Iterator[None]:
    """Turn every kind of error that a full disk causes, while something is written into `folder`, into `disk_full`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not is_disk_full(error):
            raise
        raise disk_full(folder) from error


def disk_full(folder: Path) -> EnvironmentProblem:
    """Make the error for a disk that filled up while something was written into `folder`."""
    return EnvironmentProblem(
        f"no space left on the disk of `{folder}`",
        hint="free some space, or choose a folder on another disk (`--build DIR`); the next run goes on from here",
    )


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; rename it to `path` on success, remove it on any failure.

    Raises:
        EnvironmentProblem: The disk is full.
    """
    with explain_disk_full(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix stays last: writers choose the format by it.
        handle, name = tempfile.mkstemp(prefix=f"{TEMPORARY}{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside `path`; on success it takes the place of `path`, on any failure it is removed.

    Raises:
        EnvironmentProblem: The disk is full.
    """
    with explain_disk_full(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{path.name}-", dir=path.parent))
        try:
            work.chmod(0o777 & ~_umask())
            yield work
            # A folder cannot be renamed over a full one: the old one steps aside, and goes when the new one is in.
            old = work.with_name(f"{work.name}-old")
            if path.exists():
                path.rename(old)
            work.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def write_text_atomic(text: str, path: Path) -> None:
    """Write UTF-8 text to `path`, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_json(value: Any) -> str:
    """Return indented JSON; infinities and NaN, which JSON lacks and equal tensors have as SQNR, become text."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)


def write_json_atomic(value: Any, path: Path) -> None:
    """Write `value` to `path` as `to_json` gives it, whole or not at all; `read_json` gives it back."""
    write_text_atomic(f"{to_json(value)}\n", path)


def read_json(path: Path) -> Any:
    """Read what `write_json_atomic` wrote, infinities included.

    Raises:
        PreconditionError: The file is missing or no JSON.
    """
    try:
        return _floats(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise PreconditionError(f"`{path}` cannot be read as JSON: {error}", hint="run its stage again") from error


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return next(text for text, number in _NUMBERS.items() if repr(number) == repr(value))
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    return _NUMBERS.get(value, value) if isinstance(value, str) else value


def _umask() -> int:
    # The mask can only be read by setting it; temporary names are made private, finished ones follow the user's mask.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
