"""`sdconvert encodings convert` and `inspect` on files of every version."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sdconvert.cli.app import main
from sdconvert.cli.inspect import _recognize
from sdconvert.io.tensors import save_tensors

ENTRY = {"name": "conv.weight", "enc_type": "PER_CHANNEL", "dtype": "INT", "bw": 8, "is_sym": True}
LISTS = {
    "version": "1.0.0",
    "activation_encodings": [],
    "param_encodings": [ENTRY | {"scale": [0.5], "offset": [-128]}],
}


@pytest.fixture(autouse=True)
def _hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets it for its process."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "x.encodings").write_text(json.dumps(LISTS))
    return tmp_path / "x.encodings"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    with pytest.raises(SystemExit) as end:
        main(["--json", *map(str, arguments)])
    code = end.value.code
    assert isinstance(code, int)
    return code, json.loads(capsys.readouterr().out)


def test_there_and_back(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, typed, back = (file.with_name(name) for name in ("w.safetensors", "typed.encodings", "back.encodings"))
    save_tensors({"conv.weight": torch.zeros(1, 2)}, weights)
    code, data = run(capsys, "encodings", "convert", file, "--to", "2.0.0", "-o", typed, "--weights", weights)
    assert (code, data["from"], data["to"], data["encodings"], data["lost"]) == (0, "1.0.0", "2.0.0", 1, {})
    assert run(capsys, "encodings", "convert", typed, "--to", "1.0.0", "-o", back)[0] == 0
    assert json.loads(back.read_text()) == LISTS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "2.0.0", "-o", "typed.encodings"], "does not say along what"),
        (["--to", "1.0.0", "-o", "other.encodings"], "has form 1.0.0 already"),
        (["--to", "0.6.1", "-o", "x.encodings"], "is the file itself"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(file.parent)
    code, data = run(capsys, "encodings", "convert", file, *options)
    assert code == 2
    assert message in data["error"]["message"]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_inspect_counts_grids(file: Path) -> None:
    kind, describe = _recognize(file)
    data, table = describe(file)
    assert (kind, data["version"]) == ("encodings", "1.0.0")
    assert data["sections"]["param_encodings"] == {"entries": 1, "grids": {"int8 channel": 1}}
    assert ("param_encodings", 1, "1 int8 channel") in table.rows
