"""The page about plugins does what it says: its blocks run in order, in the folder of its files."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "writing_a_plugin.md"


def test_every_block_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    scope: dict[str, Any] = {}
    ran = 0
    for block in re.findall(
        r"^```(?:python|yaml)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    ):
        if named := re.match(r"# (\w+\.(?:py|yaml))\n", block):
            Path(named[1]).write_text(block, encoding="utf-8")
        else:
            exec(compile(block, str(PAGE), "exec"), scope)
            ran += 1
    sys.modules.pop("channel_gain", None)
    assert ran == 4
    assert {path.name for path in tmp_path.iterdir()} >= {"channel_gain.py", "plugins.yaml"}
