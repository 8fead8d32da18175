"""The generated pages are those of this program."""

from collections.abc import Callable
from types import ModuleType


def test_pages_are_current(load_script: Callable[[str], ModuleType]) -> None:
    make_docs = load_script("make_docs")
    for name, text in make_docs.pages().items():
        assert (make_docs.DOCS / name).read_text() == text, "run `make docs`"
