"""The checksum of a stage's code changes with that code, near or far, and with nothing else."""

from pathlib import Path

import pytest

from sdconvert import source


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package in the place of sdconvert: stage -> tool -> helper, and an unrelated file."""
    root = tmp_path / "sdconvert"
    files = {
        "__init__.py": "",
        "config.py": "",
        "unrelated.py": "",
        "helper.py": "import os",
        "tools/__init__.py": "from sdconvert.tools.near import tool",
        "tools/near.py": "def tool():\n    from sdconvert import helper\n    import torch",
        "stage/__init__.py": "",
        "stage/stage.py": "from sdconvert.config import Recipe\nimport sdconvert.tools",
        "stage/template.html": "<p>",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(source, "PACKAGE", root)
    return root


@pytest.mark.parametrize("name", ["stage/stage.py", "stage/template.html", "tools/near.py", "helper.py"])
def test_code_within_reach_counts(package: Path, name: str) -> None:
    before = source.source_hash(package / "stage/stage.py")
    (package / name).write_text((package / name).read_text() + "\n# changed")
    assert source.source_hash(package / "stage/stage.py") != before


@pytest.mark.parametrize("name", ["unrelated.py", "config.py", "stage/__pycache__/stage.pyc"])
def test_other_code_does_not(package: Path, name: str) -> None:
    before = source.source_hash(package / "stage/stage.py")
    (package / name).parent.mkdir(exist_ok=True)
    (package / name).write_text("# changed")
    assert source.source_hash(package / "stage/stage.py") == before


def test_a_stage_from_outside_counts_with_what_it_imports(package: Path, tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("")
    outside = tmp_path / "outside.py"
    outside.write_text("from sdconvert.helper import x")
    before = source.source_hash(outside)
    (tmp_path / "neighbour.py").write_text("# changed")
    assert source.source_hash(outside) == before
    (package / "helper.py").write_text("# changed")
    assert source.source_hash(outside) != before
