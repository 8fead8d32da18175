"""What a config does wrong ends in one error that names it."""

from pathlib import Path

import pytest

from sdconvert.errors import CheckpointError
from sdconvert.models.config_json import making_model, read_config


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"width": 3, "name": "ü"}', encoding="utf-8")
    assert read_config(tmp_path / "config.json") == {"width": 3, "name": "ü"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "Expecting value"),
        (b'{"a": ', "Expecting value"),
        (b"\xff", "decode"),
        (b"[]", "holds a list, not an object"),
        (b'"text"', "holds a str, not an object"),
    ],
)
def test_what_holds_no_object_is_refused_by_name(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json`.*{message}") as caught:
        read_config(path)
    assert caught.value.hint


@pytest.mark.parametrize("error", [ValueError, TypeError, AttributeError, KeyError, IndexError, ZeroDivisionError])
def test_what_constructors_raise_is_one_error(error: type[Exception]) -> None:
    with (
        pytest.raises(CheckpointError, match="the config makes no UNet: .*wide") as caught,
        making_model("the config", "UNet"),
    ):
        raise error("wide")
    assert isinstance(caught.value.__cause__, error)


def test_what_is_no_fault_of_the_config_passes() -> None:
    with pytest.raises(KeyboardInterrupt), making_model("the config", "UNet"):
        raise KeyboardInterrupt
