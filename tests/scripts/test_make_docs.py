"""The generated pages are those of this program."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts/make_docs.py"


def test_pages_are_current() -> None:
    spec = importlib.util.spec_from_file_location("make_docs", SCRIPT)
    assert spec
    assert spec.loader
    make_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_docs)
    for name, text in make_docs.pages().items():
        assert (make_docs.DOCS / name).read_text() == text, "run `make docs`"
