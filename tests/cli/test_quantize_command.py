"""`sdconvert quantize` as a stage and as a group: which words are commands, and a recipe from figures on disk."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sdconvert.cli.app import main
from sdconvert.config import load_recipe


@pytest.fixture(autouse=True)
def _hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets it for its process."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    with pytest.raises(SystemExit) as end:
        main(["--json", "quantize", *map(str, arguments)])
    code = end.value.code
    assert isinstance(code, int)
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def build(tmp_path: Path) -> Path:
    layers = {
        f"conv_{name}.weight": {"weights": 1000, "output_db": {"4": db, "8": db + 24}, "picture_db": {}}
        for name, db in (("in", 10.0), ("out", 20.0))
    }
    (tmp_path / "pasd_tiny").mkdir()
    content = {"schema_version": 1, "identity": "", "graphs": {"unet": {"layers": layers, "cumulative": {}}}}
    (tmp_path / "pasd_tiny" / "sensitivity.json").write_text(json.dumps(content))
    return tmp_path


def test_a_recipe_is_no_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, data = run(capsys, "no_such_recipe", "--build", tmp_path)
    assert (code, data["error"]["message"]) == (2, "no recipe is called `no_such_recipe`")
    code, data = run(capsys, "--set", "quantize.adaroundd=true", "--build", tmp_path)
    assert (code, data["error"]["hint"]) == (2, "did you mean `adaround`?")


def test_the_choice_is_written_and_read_again(capsys: pytest.CaptureFixture[str], build: Path) -> None:
    out = build / "six.yaml"
    code, data = run(capsys, "recipe", "--build", build, "--target-bits", 6, "-o", out)
    assert code == 0
    assert (data["bits_per_weight"], data["weight_bytes"], data["layers"]) == (6.0, 1500, {"4": 1, "8": 1})
    recipe = load_recipe(out)
    assert recipe.name == "six"
    assert {key: one.weight_bitwidth for key, one in recipe.quantize.layers.items()} == {"unet:conv_out": 4}
    assert run(capsys, "recipe", "--build", build, "--target-size", "1500B", "-o", out)[1]["bits_per_weight"] == 6.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one target is needed"),
        (["--target-bits", 6, "--target-sqnr", 30], "one target is needed"),
        (["--target-bits", 3], "no choice of bit-widths reaches the target"),
        (["--target-size", "much"], "--target-size much is no amount of bytes"),
    ],
)
def test_targets_that_are_none(
    capsys: pytest.CaptureFixture[str], build: Path, options: list[object], message: str
) -> None:
    code, data = run(capsys, "recipe", "--build", build, "-o", build / "x.yaml", *options)
    assert (code, data["error"]["message"]) == (2, message)
    assert not (build / "x.yaml").exists()


def test_without_figures_there_is_no_choice(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, data = run(capsys, "recipe", "--build", tmp_path, "--target-bits", 6)
    assert code == 2
    assert "holds no sensitivity figures" in data["error"]["message"]
    assert "quantize sensitivity" in data["error"]["hint"]
